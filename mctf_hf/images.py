"""Reading image files and images stored by ``datasets``, and converting them to tensors.

All commands convert images here, so all of them see the same pixels. Images and processor settings
that would need too much memory are rejected first.
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

OnBadImage = Literal["error", "skip"]  # action for an image that cannot be read
MODES = {1: "L", 3: "RGB"}  # Pillow modes by number of channels
HEIF = (".heic", ".heif", ".hif")
# Formats that Pillow knows by name but cannot decode, or decodes with an external program.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()


def is_image_name(name: str) -> bool:
    """Whether the extension of a file name belongs to a readable image format."""
    ending = os.path.splitext(name)[1].lower()
    kind = Image.registered_extensions().get(ending)
    return kind in Image.OPEN and kind not in NOT_READ


def needs_heif(name: str) -> bool:
    """Whether reading a file of this name needs pillow-heif, which is not installed."""
    return pillow_heif is None and os.path.splitext(name)[1].lower() in HEIF


class UnreadableImage(ValueError):
    """Error for a row or file without an image, or with one that is undecodable or too large."""


def read_image(source: Any, channels: int = 3) -> Image.Image:
    """Decode an image file to RGB or grey, turned upright; 16-bit pixels keep the upper 8 bits.

    Args:
        source: path or open file.
        channels: 3 for RGB, or 1 for grey.

    Raises:
        ValueError: for more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, a path that is not a
            regular file, and pixels of unknown range: 32-bit integers and floats.
    """
    with _opened(source) as stored:
        ImageOps.exif_transpose(stored, in_place=True)
        return in_channels(stored, channels)


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """Open an image file; only its header is read."""
    if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("it is no file")  # opening a pipe would block
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
    """Convert an image to RGB (3 channels) or grey (1); 16-bit pixels keep the upper 8 bits.

    Raises:
        ValueError: for pixels of unknown range: 32-bit integers and floats.
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
        raise ValueError(f"mode {image.mode} does not define what is white")
    return image.convert(mode)


def decode(stored: dict[str, Any] | str | Path | None, name: str, channels: int = 3) -> Image.Image:
    """Decode an image file, or an image as ``datasets`` stores it, to RGB or grey.

    Raises:
        UnreadableImage: with the name, if there is no image or it cannot be decoded.
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
    """Check only the header of an image file, which contains its format and size.

    Raises:
        UnreadableImage: if the file is no image or of an unsupported format.
    """
    with _named(str(file)), _opened(file):
        pass


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Replace errors of the block by UnreadableImage with the name of the image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow may raise any error for a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if unknown else error
        if isinstance(error, Image.DecompressionBombError):
            reason = str(error).partition(",")[0]
        raise UnreadableImage(f"{name} holds no readable image: {reason}") from error


class ImageReader:
    """Decodes images for one model and converts them with the model's image processor.

    Args:
        processor: image processor of transformers.
        channels: number of image channels of the model: 3, or 1 for grey.
        options: keyword arguments for calls of the processor.

    Raises:
        ValueError: for another number of channels, or a processor that fails or outputs another
            number of channels or values that are not finite.
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
        except Exception as error:  # its settings may cause any error
            raise ValueError(f"{type(processor).__name__} can't be used: {error}") from error
        problem = None if made.isfinite().all() else "it makes numbers that are not finite"
        if len(made) != channels:
            problem = f"it makes {len(made)} channels instead of {channels}"
        if problem is not None:
            raise ValueError(f"{type(processor).__name__} can't be used: {problem}")

    def read(self, stored: Any, name: str) -> Image.Image:
        """Decode the image of a row or file, see :func:`decode`.

        Raises:
            UnreadableImage: with the name; also for an image that :meth:`admit` rejects.
        """
        return self.admit(decode(stored, name, self.channels), name)

    def admit(self, image: Image.Image, name: str) -> Image.Image:
        """Convert a decoded image to the model's channels.

        Raises:
            UnreadableImage: with the name, if that fails or the processor's result is too large.
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
        """Convert an admitted image to pixel values: (channels, height, width)."""
        return self.processor(image, return_tensors="pt", **self.options)["pixel_values"][0]

    def batch(self, images: Iterable[Image.Image]) -> Tensor:
        """Convert images of any mode and size to one batch: (b, channels, height, width).

        Raises:
            ValueError: if the processor outputs images of several sizes.
        """
        return self.stack([self(self.admit(image, f"image {i}")) for i, image in enumerate(images)])

    @staticmethod
    def stack(made: Sequence[Tensor]) -> Tensor:
        """Stack pixel values of several images: (b, channels, height, width).

        Raises:
            ValueError: see :meth:`batch`.
        """
        sizes = sorted({tuple(pixels.shape[-2:]) for pixels in made})
        if len(sizes) > 1:
            listed = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(
                f"the image processor makes images of several sizes ({listed}), which are no "
                "batch: it is to crop them, or to resize them to a height and a width"
            )
        return torch.stack(list(made))


def usual_processor(config: Any) -> ViTImageProcessorPil:
    """Image processor for a model without one: the model's usual size, pixel values in [-1, 1].

    Args:
        config: configuration of this library.
    """
    height, width = config.usual_size
    half = [0.5] * config.num_channels
    size = {"height": height, "width": width}
    return ViTImageProcessorPil(size=size, image_mean=half, image_std=half)


def scaling(processor: Any, channels: int = 3) -> tuple[Tensor, Tensor]:
    """What a processor subtracts from pixels and divides by: (channels, 1, 1) float64 each."""
    unit = 1 / processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = 0.0, 1.0
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std

    def scaled(values: Any) -> Tensor:
        return unit * torch.as_tensor(values, dtype=torch.float64).expand(channels)[:, None, None]

    return scaled(mean), scaled(std)


def to_image(processor: Any, pixel_values: Tensor) -> Image.Image:
    """Undo a processor's scaling of one image, (channels, height, width); return it in RGB."""
    mean, std = scaling(processor, len(pixel_values))
    pixels = (pixel_values.double().cpu() * std + mean).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def made_size(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Upper limit of an image's height and width while a processor converts it."""
    size = getattr(processor, "size", None) or {}
    if not getattr(processor, "do_resize", None):
        cropped = getattr(processor, "do_center_crop", None)
        return (1, 1) if cropped else (height, width)
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if not shortest and not longest:
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        return height, width  # other kinds of sizes do not enlarge images
    scales = [] if not shortest else [shortest / min(height, width)]
    scales += [] if not longest else [longest / max(height, width)]
    return math.ceil(min(scales) * height), math.ceil(min(scales) * width)
