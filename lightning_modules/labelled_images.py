"""Datasets of single samples: rows of datasets with labels, and image files of folders."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from mctf_hf.images import MODES, ImageReader, OnBadImage, UnreadableImage

from .augmentation import FlipAndCrop
from .columns import Columns
from .image_task import ImageTask
from .labels import NOT_COUNTED, encode, not_counted, settle
from .processors import output_size

Sample = dict[str, Any]
DRAWS = 2**53  # random integers below this are exact as float64


class PixelReader(ImageReader):
    """Reads images with the image processor, see :class:`mctf_hf.images.ImageReader`."""

    def black(self, label: Any = NOT_COUNTED) -> Sample:
        """Sample of a black image that replaces a missing one; its default label is not counted."""
        height, width = output_size(self.processor)
        image = Image.new(MODES[self.channels], (width, height))
        return {"pixel_values": self(image), "labels": label}


class AsBytes(PixelReader):
    """Reads images without the image processor, as (channels, height, width) uint8."""

    def __call__(self, image: Image.Image) -> Tensor:
        return as_bytes(image)


def as_bytes(image: Image.Image) -> Tensor:
    """Convert an image in RGB or grey to (channels, height, width) uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


class Rows:
    """Rows of one split: undecoded images, and labels as the model takes them.

    Args:
        rows: rows of the split.
        origin: name of the split in error messages.
        columns: image and label columns.
        task: task of the model.
        names: class names in order, if the labels are names.

    Raises:
        ValueError: for no rows, a row without label, or labels that :func:`.labels.settle` rejects.
    """

    def __init__(
        self,
        rows: Dataset,
        origin: str,
        columns: Columns,
        task: ImageTask,
        names: Sequence[str] | None = None,
    ):
        self.origin = origin
        self.image_column, self.label_names = columns.image, columns.label_names
        labels = rows[columns.label][:]
        if not labels:
            raise ValueError(f"{origin} has no rows")
        if columns.by_name and None not in labels:
            self.label_names = list(names or [])
            numbers = {name: i for i, name in enumerate(self.label_names)}
            labels = [numbers[name] for name in labels]
        self.labels = settle(
            encode(labels, columns.feature, self.name),
            task.problem_type,
            task.num_labels,
            named=self.label_names is not None,
            origin=origin,
            row_name=self.name,
        )
        self.not_counted: Any = not_counted(task.problem_type, task.num_labels)
        self.images = rows.select_columns([self.image_column]).cast_column(
            self.image_column, ImageFeature(decode=False)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Name of a row in error messages."""
        return f"row {index} of {self.origin}"

    def stored(self, index: int) -> tuple[Any, str]:
        """The stored image of a row, and the row's name in error messages."""
        return self.images[index][self.image_column], self.name(index)


class LabelledImages(TorchDataset):
    """Images and labels of some rows.

    The key of an item is its index, (epoch, index) or (epoch, index, copy). The key and the seed
    determine the augmentation.

    Args:
        rows: rows of a split.
        reader: reads an image and converts it to a tensor.
        augment: augmentation of training images.
        indices: numbers of the rows to use; unset, all.
        seed: seed of the augmentation.
        num_draws: number of random integers per sample, for the augmentation of whole batches.
        on_bad_image: ``"skip"`` replaces an image that cannot be read by the next readable row. The
            sample then contains ``skipped``: 1 if it was replaced, else 0.
        leave_out: let ``"skip"`` use a black image that is not counted instead.
    """

    def __init__(
        self,
        rows: Rows,
        reader: PixelReader,
        *,
        augment: FlipAndCrop | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        num_draws: int = 0,
        on_bad_image: OnBadImage = "error",
        leave_out: bool = False,
    ):
        self.rows = rows
        self.reader = reader
        self.augment = augment
        self.indices = range(len(rows)) if indices is None else indices
        self.seed = seed
        self.num_draws = num_draws
        self.on_bad_image = on_bad_image
        self.leave_out = leave_out

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, if they have any."""
        return self.rows.label_names

    def summary(self) -> str:
        """Text with the number of images and classes."""
        labels = self.rows.labels[np.asarray(self.indices)]
        if labels.ndim > 1 and self.label_names is None:
            return f"{len(self):,} images"
        classes = len(np.unique(labels)) if labels.ndim == 1 else np.count_nonzero(labels.any(0))
        return f"{len(self):,} images of {classes:,} {'class' if classes == 1 else 'classes'}"

    def black(self) -> Sample:
        """Sample of a black image that is not counted."""
        return self.reader.black(self.rows.not_counted)

    def __getitem__(self, key: int | tuple[int, ...]) -> Sample:
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        asked = int(self.indices[index])
        for skipped in range(len(self)):
            row = int(self.indices[(index + skipped) % len(self)])
            try:
                image = self.reader.read(*self.rows.stored(row))
            except UnreadableImage as error:
                if self.on_bad_image == "error":
                    raise
                warnings.warn(f"{error}: skipped", stacklevel=2)
                if self.leave_out:
                    return {**self.black(), "skipped": 1}
                continue
            generator = np.random.default_rng([self.seed, epoch, asked, *copy])
            sample = make_sample(image, self.reader, self.augment, generator, self.num_draws)
            label = self.rows.labels[row]
            sample["labels"] = int(label) if label.ndim == 0 else label
            if self.on_bad_image == "skip":
                sample["skipped"] = int(skipped > 0)
            return sample
        raise ValueError(f"none of the {len(self)} images of {self.rows.origin} can be read")


def make_sample(
    image: Image.Image,
    reader: PixelReader,
    augment: FlipAndCrop | None,
    generator: np.random.Generator,
    num_draws: int,
) -> Sample:
    """Convert an image to a sample with ``num_draws`` random integers for batch augmentation."""
    if augment is not None:
        image = augment(image, generator)
    sample: Sample = {"pixel_values": reader(image)}
    if num_draws:
        sample["draws"] = generator.integers(DRAWS, size=num_draws)
    return sample


class ImageFolder(TorchDataset):
    """Images of files, with the names of the files.

    Args:
        files: image files in the order of the items.
        reader: reads an image and converts it to a tensor.
        on_bad_image: ``"skip"`` replaces an image that cannot be read by a black one. The sample
            then contains ``errors``: the reason, or an empty text.
    """

    def __init__(
        self, files: Sequence[Path], reader: PixelReader, on_bad_image: OnBadImage = "error"
    ):
        self.files = files
        self.reader = reader
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        name, reason = str(self.files[index]), ""
        try:
            pixel_values = self.reader(self.reader.read(self.files[index], name))
        except UnreadableImage as error:
            if self.on_bad_image == "error":
                raise
            warnings.warn(f"{error}: skipped", stacklevel=2)
            pixel_values, reason = self.reader.black()["pixel_values"], str(error)
        sample = {"pixel_values": pixel_values, "files": name}
        return sample | ({"errors": reason} if self.on_bad_image == "skip" else {})
