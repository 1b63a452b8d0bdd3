"""Image files, and what ``datasets`` stores of them, as the pixels that a model takes.

Whatever turns an image into a tensor does it here: every command sees the same of an image, and an
image or a processor's settings that would fill the memory are refused before they do.
"""

import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import ViTImageProcessorPil

from .checks import LARGEST_EDGE, check_processor

OnBadImage = Literal["error", "skip"]  # what is done about an image that cannot be read
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
HEIF = (".heic", ".heif", ".hif")
# Pillow knows their names, but holds no decoder, or runs a program to draw them.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()


def is_image_name(name: str) -> bool:
    """Whether a file of this name is one of those that can be read, by its ending."""
    ending = os.path.splitext(name)[1].lower()
    kind = Image.registered_extensions().get(ending)
    return kind in Image.OPEN and kind not in NOT_READ


def needs_heif(name: str) -> bool:
    """Whether it takes pillow-heif, which is not installed, to read a file of this name."""
    return pillow_heif is None and os.path.splitext(name)[1].lower() in HEIF


class UnreadableImage(ValueError):
    """A row or file that holds no image, or one that can't be decoded within bounds."""


def read_image(source: Any, channels: int = 3) -> Image.Image:
    """Decode an image file, upright, to RGB or grey, of 16 bits per pixel the upper eight.

    Args:
        source: a path, or a file that is open.
        channels: 3, or 1 for grey.

    Raises:
        ValueError: for more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, for what is no regular file
            and for numbers that have no highest one: 32-bit integers and real numbers.
    """
    with _opened(source) as stored:
        ImageOps.exif_transpose(stored, in_place=True)
        return in_channels(stored, channels)


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """An image file, of which no more than the head is read yet."""
    if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("it is no file")  # a pipe would be waited for
    with Image.open(source) as stored:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and stored.width * stored.height > most:
            raise ValueError(
                f"{stored.height} x {stored.width} pixels are more than {most:,}, Pillow's limit"
            )
        if stored.format in NOT_READ:
            raise ValueError(f"{stored.format} files are not read")
        yield stored


def in_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image of any mode in RGB (3 channels) or grey (1), of 16 bits the upper eight.

    Raises:
        ValueError: for numbers that have no highest one: 32-bit integers and real numbers.
    """
    mode = MODES[channels]
    if image.mode == mode:
        image.load()
        return image.copy()
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert(mode)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not tell what is white")
    return image.convert(mode)


def decode(stored: dict[str, Any] | str | Path | None, name: str, channels: int = 3) -> Image.Image:
    """The image of a file or of what ``datasets`` stores for one, in RGB or grey.

    Raises:
        UnreadableImage: with the name, if there is none or it can't be decoded.
    """
    if stored is None:
        raise UnreadableImage(f"{name} has no image")
    source: Any = stored
    if isinstance(stored, dict):
        name += f" ({stored['path']})" if stored["path"] else ""
        source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
    with _named(name):
        return read_image(source, channels)


def check_head(file: Path) -> None:
    """Look at the head of an image file alone, which tells its format and size.

    Raises:
        UnreadableImage: if it is none, or none that is read; what follows the head may be damaged.
    """
    with _named(str(file)), _opened(file):
        pass


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Tell the name of an image that can't be read."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow may raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if unknown else error
        if isinstance(error, Image.DecompressionBombError):
            reason = str(error).partition(",")[0]
        raise UnreadableImage(f"{name} holds no readable image: {reason}") from error


class ImageReader:
    """Images for one model: how they are decoded, and what its image processor makes of them.

    Args:
        processor: an image processor of transformers.
        channels: of the images that the model takes: 3, or 1 for grey.
        options: of the processor's call.

    Raises:
        ValueError: for another number of channels, a processor that makes other ones, or one that
            makes nothing of an image.
    """

    def __init__(self, processor: Any, channels: int = 3, **options: Any):
        if channels not in MODES:
            raise ValueError(
                f"num_channels={channels!r} is not allowed where image files are read: they are "
                "read in colour (3) or grey (1). For others, make pixel_values by code of your own"
            )
        check_processor(processor, type(processor).__name__)
        if getattr(processor, "do_normalize", None):
            for setting in ("image_mean", "image_std"):
                value = getattr(processor, setting)
                if isinstance(value, Iterable) and len(list(value)) != channels:
                    raise ValueError(
                        f"{setting}={value!r} of the image processor is not allowed: the model has "
                        f"num_channels={channels}, and there is one number for each"
                    )
        if channels != 3 and getattr(processor, "do_convert_rgb", None):
            raise ValueError(
                "do_convert_rgb=True of the image processor is not allowed: the model has "
                f"num_channels={channels}"
            )
        self.processor = processor
        self.channels = channels
        self.options = options
        try:
            made = ImageReader.__call__(self, Image.new(MODES[channels], (64, 64)))
        except Exception as error:  # whatever its settings are
            raise ValueError(f"{type(processor).__name__} can't be used: {error}") from error
        if len(made) != channels or not made.isfinite().all():
            raise ValueError(
                f"{type(processor).__name__} can't be used: of {channels} channels it makes "
                f"{len(made)}, or numbers that are not finite"
            )

    def read(self, stored: Any, name: str) -> Image.Image:
        """Decode what a row or a file holds, see :func:`decode`.

        Raises:
            UnreadableImage: with the name, also for what the processor can't take.
        """
        return self.admit(decode(stored, name, self.channels), name)

    def admit(self, image: Image.Image, name: str) -> Image.Image:
        """A decoded image in the model's channels, if what the processor makes of it is bounded.

        Raises:
            UnreadableImage: with the name, if it is not.
        """
        if image.mode != MODES[self.channels]:
            try:
                image = in_channels(image, self.channels)
            except ValueError as error:
                raise UnreadableImage(f"{name} can't be used: {error}") from error
        height, width = made_size(self.processor, image.height, image.width)
        if height * width > LARGEST_EDGE**2:
            raise UnreadableImage(
                f"{name} has {image.height} x {image.width} pixels, of which the image processor "
                f"would make {height:,} x {width:,}: more than {LARGEST_EDGE} x {LARGEST_EDGE}"
            )
        return image

    def __call__(self, image: Image.Image) -> Tensor:
        """What the processor makes of an admitted image: (channels, height, width)."""
        return self.processor(image, return_tensors="pt", **self.options)["pixel_values"][0]

    def batch(self, images: Iterable[Image.Image]) -> Tensor:
        """Images of any mode and size as (b, channels, height, width).

        Raises:
            ValueError: if the processor makes images of several sizes.
        """
        return self.stack([self(self.admit(image, f"image {i}")) for i, image in enumerate(images)])

    @staticmethod
    def stack(made: Sequence[Tensor]) -> Tensor:
        """What calls have made of images as (b, channels, height, width).

        Raises:
            ValueError: see :meth:`batch`.
        """
        sizes = sorted({tuple(pixels.shape[-2:]) for pixels in made})
        if len(sizes) > 1:
            told = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(
                f"the image processor makes images of several sizes ({told}), which are no batch: "
                "it is to crop them, or to resize them to a height and a width"
            )
        return torch.stack(list(made))


def usual_processor(config: Any) -> ViTImageProcessorPil:
    """What makes pixels for a model that comes without a processor: its usual size, -1 to 1.

    Args:
        config: of a model of this library.
    """
    height, width = config.usual_size
    half = [0.5] * config.num_channels
    size = {"height": height, "width": width}
    return ViTImageProcessorPil(size=size, image_mean=half, image_std=half)


def scaling(processor: Any, channels: int = 3) -> tuple[Tensor, Tensor]:
    """What a processor subtracts from pixels, and divides by: each (channels, 1, 1) float64."""
    unit = 1 / processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = 0.0, 1.0
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std

    def scaled(values: Any) -> Tensor:
        return unit * torch.as_tensor(values, dtype=torch.float64).expand(channels)[:, None, None]

    return scaled(mean), scaled(std)


def to_image(processor: Any, pixel_values: Tensor) -> Image.Image:
    """Undo a processor's scaling of one image, (channels, height, width), for the eye, in RGB."""
    mean, std = scaling(processor, len(pixel_values))
    pixels = (pixel_values.double().cpu() * std + mean).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def made_size(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image while a processor works on it as numbers, at most."""
    size = getattr(processor, "size", None) or {}
    if not getattr(processor, "do_resize", None):
        cropped = getattr(processor, "do_center_crop", None)
        return (1, 1) if cropped else (height, width)
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if not shortest and not longest:
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        return height, width  # no larger than it is, in all other ways to tell a size
    scales = [] if not shortest else [shortest / min(height, width)]
    scales += [] if not longest else [longest / max(height, width)]
    return math.ceil(min(scales) * height), math.ceil(min(scales) * width)
