"""Batches of the units of an image collection, decoded in workers and always the same."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mctf_hf.images import ImageReader, OnBadImage, UnreadableImage

from .image_units import ImageSource, StoredImage
from .sampling import stop_with_parent_only
from .vector_folder import UnitBatch, Unreadable


class UnitBatches(IterableDataset):
    """Batches of some units; one worker reads all batches of a unit.

    A batch contains the readable ones of ``batch_size`` consecutive images of one unit. It does not
    depend on the number of workers and processes.

    Args:
        source: image collection.
        units: numbers of the units to read.
        reader: decodes an image and converts it to a tensor.
        batch_size: images per batch, including unreadable ones.
        on_bad_image: ``error`` stops at an image that cannot be read, ``skip`` reports the image.
    """

    def __init__(
        self,
        source: ImageSource,
        units: Sequence[int],
        reader: ImageReader,
        *,
        batch_size: int,
        on_bad_image: OnBadImage,
    ):
        self.source, self.units, self.reader = source, units, reader
        self.batch_size, self.on_bad_image = batch_size, on_bad_image

    def __iter__(self) -> Iterator[UnitBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for unit in self.units[worker::workers]:
            images = iter(self.source.read(unit))
            chunk = list(islice(images, self.batch_size))
            while True:
                following = list(islice(images, self.batch_size))
                yield self._batch(unit, chunk, last=not following)
                if not following:
                    break
                chunk = following

    def _batch(self, unit: int, images: Sequence[StoredImage], *, last: bool) -> UnitBatch:
        ids, made, unreadable = list[str](), list[torch.Tensor](), list[Unreadable]()
        columns: dict[str, list[Any]] = {name: [] for name in self.source.features}
        for image in images:
            name = f"{image.id} of {self.source.origin}"
            try:
                if image.problem is not None:
                    raise UnreadableImage(f"{name} can't be read: {image.problem}")
                pixels = self.reader(self.reader.read(image.stored, name))
            except UnreadableImage as error:
                if self.on_bad_image == "error":
                    raise UnreadableImage(
                        f"{error}. --on_bad_image skip leaves such images out, and reports them"
                    ) from error
                warnings.warn(f"{error}: skipped", stacklevel=2)
                unreadable.append(Unreadable(image.id, str(error)))
                continue
            made.append(pixels)
            ids.append(image.id)
            for column, values in columns.items():
                values.append(image.columns[column])
        stacked = self.reader.stack(made) if made else None
        return UnitBatch(unit, last, ids, columns, stacked, unreadable)


def load_units(batches: UnitBatches, num_workers: int, *, pin_memory: bool = False) -> DataLoader:
    """Create a loader whose workers decode ahead, with at most one worker per unit."""
    workers = min(num_workers, len(batches.units))
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=stop_with_parent_only,
    )
