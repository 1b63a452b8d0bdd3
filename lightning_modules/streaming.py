"""Images of datasets that are streamed in shards, so they need not fit on the disk or in memory."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet
import torch
from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchIterableDataset

from mctf_hf.images import OnBadImage, UnreadableImage

from .augmentation import FlipAndCrop
from .columns import Columns, find_columns
from .evaluation_loaders import in_step
from .image_task import ImageTask
from .labelled_images import PixelReader, Sample, make_sample
from .labels import encode, not_counted, settle
from .ranks import warn_once
from .sampling import ResumableDataLoader

Batch = dict[str, Any]
SHARDS_EACH = 8  # with this many shards per process or more, their numbers may be unequal


@dataclass(frozen=True)
class Share:
    """The part of a stream that the process ``rank`` of ``world_size`` processes reads."""

    rank: int = 0
    world_size: int = 1


class StreamedImages(TorchIterableDataset):
    """Images and labels of a stream, each once per epoch over all processes and their workers.

    A process reads its own shards if the number of shards is a multiple of the processes, or at
    least ``SHARDS_EACH`` per process (in evaluation, at least one). Otherwise it reads every
    ``world_size``-th row of all shards, with a warning. Its workers share the shards. Order and
    augmentation depend only on the seed, the epoch, the process and the worker, so they are the
    same in every run with the same numbers of processes and workers.

    Args:
        rows: stream of one split.
        origin: name of the stream in error messages.
        reader: reads an image and converts it to a tensor.
        share: share of this process.
        task: task of the model.
        batch_size: images per batch; the loader must use the same number.
        shuffle_buffer: rows from which the next row is drawn at random; None keeps the order.
        image_column, label_column: see ``find_columns``.
        augment, seed, num_draws: see ``LabelledImages``.
        on_bad_image: ``"skip"`` replaces an image that cannot be read by the next readable row of
            its batch or, in evaluation, by a black image that is not counted.

    Raises:
        ValueError: for missing columns, or labels that are names.
    """

    def __init__(
        self,
        rows: IterableDataset,
        origin: str,
        reader: PixelReader,
        *,
        share: Share,
        task: ImageTask,
        batch_size: int,
        shuffle_buffer: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        augment: FlipAndCrop | None = None,
        seed: int = 0,
        num_draws: int = 0,
        on_bad_image: OnBadImage = "error",
    ):
        self.columns: Columns = find_columns(rows, origin, image_column, label_column)
        self.num_shards: int = rows.num_shards
        image, label = self.columns.image, self.columns.label
        if self.columns.by_name:
            raise ValueError(
                f"{origin} has names for labels in {label}, whose order a stream does not show: "
                "encode them before (datasets' class_encode_column does)"
            )
        rows = rows.select_columns([image, label]).cast_column(image, ImageFeature(decode=False))
        world_size = share.world_size
        # In evaluation, processes may have unequal numbers of rows.
        enough = world_size * (1 if augment is None else SHARDS_EACH)
        own_shards = rows.num_shards >= enough
        if own_shards:
            rows = rows.shard(world_size, share.rank, contiguous=False)
        if shuffle_buffer is not None:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        if not own_shards:
            if rows.num_shards % world_size:
                warn_once(
                    f"{origin} has {rows.num_shards} shards: each of {world_size} processes reads "
                    f"all of them. Fewer processes, or {enough} shards or more, would be faster"
                )
            rows = split_dataset_by_node(rows, share.rank, world_size)
        self.rows = rows
        self.origin = origin
        self.reader = reader
        self.share = share
        self.task = task
        self.label_names = self.columns.label_names
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.num_draws = num_draws
        self.on_bad_image = on_bad_image
        # Shared with persistent workers: numbers of the epoch and of the pass through the stream,
        # and number of batches of all workers that are not needed.
        self._epoch = torch.zeros(3, dtype=torch.int64).share_memory_()

    def summary(self) -> str:
        """Text with the number of shards."""
        return f"a stream of images in {self.num_shards} shards"

    def begin(self, epoch: int, again: int = 0, unneeded: int = 0) -> None:
        """Prepare the next iteration: pass ``again`` of an epoch.

        The first ``unneeded`` batches are not decoded; their samples are empty.
        """
        self.rows.set_epoch(epoch)  # workers see it, too
        self._epoch.copy_(torch.tensor([epoch, again, max(0, unneeded)]))

    def __iter__(self) -> Iterator[Sample]:
        epoch, again, unneeded = self._epoch.tolist()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = iter(self.rows)
        batch = 0
        while chunk := list(islice(rows, self.batch_size)):
            first = batch * self.batch_size
            if len(chunk) == self.batch_size and batch * workers + worker < unneeded:
                yield from ({} for _ in chunk)
            else:
                yield from self._samples(chunk, first, (epoch, self.share.rank, worker, again))
            batch += 1

    def _samples(self, rows: list[Any], first: int, place: tuple[int, ...]) -> Iterator[Sample]:
        """Yield the samples of one batch; ``first`` is the number of its first row."""
        for i in range(len(rows)):
            source, image = self._readable(rows, i, first, place)
            if image is None:
                if self.augment is None:
                    yield {**self.black(), "skipped": 1}
                continue
            label = self._label(rows[source], self._name(first + source, place))
            generator = np.random.default_rng([self.seed, *place, first + i])
            sample = make_sample(image, self.reader, self.augment, generator, self.num_draws)
            sample["labels"] = label
            if self.on_bad_image == "skip":
                sample["skipped"] = int(source != i)
            yield sample

    def _label(self, row: Any, name: str) -> Any:
        columns = self.columns
        labels = encode([row[columns.label]], columns.feature, lambda _: name)
        (label,) = settle(
            labels,
            self.task.problem_type,
            self.task.num_labels,
            named=self.label_names is not None,
            origin=self.origin,
            row_name=lambda _: name,
        )
        return int(label) if label.ndim == 0 else label

    def black(self) -> Sample:
        """Sample of a black image that is not counted."""
        return self.reader.black(not_counted(self.task.problem_type, self.task.num_labels))

    def _readable(
        self, rows: list[Any], i: int, first: int, place: tuple[int, ...]
    ) -> tuple[int, Image.Image | None]:
        """Index and image of row i or, in training, of the next readable row of the batch."""
        replacements = len(rows) if self.augment is not None else 1
        for source in (j % len(rows) for j in range(i, i + replacements)):
            image = self._image(rows[source], first + source, place)
            if image is not None:
                return source, image
        if replacements == self.batch_size > 1:
            raise ValueError(f"none of {len(rows)} images in a row of {self.origin} can be read")
        return i, None

    def _image(self, row: Any, number: int, place: tuple[int, ...]) -> Image.Image | None:
        try:
            return self.reader.read(row[self.columns.image], self._name(number, place))
        except UnreadableImage as error:
            if self.on_bad_image == "error":
                raise
            warnings.warn(f"{error}: skipped", stacklevel=2)
            return None

    def _name(self, number: int, place: tuple[int, ...]) -> str:
        epoch, rank, worker, _ = place
        where = f"row {number} that worker {worker} of process {rank} reads in epoch {epoch}"
        return f"{where} of {self.origin}"


class StreamLoader(ResumableDataLoader):
    """Loader of a stream that joins the incomplete batches of its workers to whole batches.

    If ``steps`` is set, each epoch has this number of batches in every process. Images that are
    left over are not used; a share that is too short starts again with new augmentation.

    Args:
        images: stream of images.
        steps: batches per epoch; None reads the stream once, with a smaller batch at the end.
        epoch: returns the number of the epoch that begins.
        goes_on: used without ``steps``, see :func:`in_step`.
        options: arguments of ``DataLoader`` and ``ResumableDataLoader``.
    """

    dataset: StreamedImages
    batch_size: int

    def __init__(
        self,
        images: StreamedImages,
        *,
        steps: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        batches_done: Callable[[], int] = lambda: 0,
        goes_on: Callable[[bool], bool] = bool,
        **options: Any,
    ):
        super().__init__(images, batch_size=images.batch_size, batches_done=batches_done, **options)
        self.steps = steps
        self.epoch = epoch
        self.goes_on = goes_on

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a stream does not know its length")
        return self.steps

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.steps is None:
            self.dataset.begin(self.epoch())
            yield from in_step(self._whole_batches(), self.dataset, self.goes_on)
            return
        done, made, again = self.batches_done(), 0, 0
        while made < self.steps:
            self.dataset.begin(self.epoch(), again, done - made)
            made_before = made
            for batch in self._whole_batches():
                if made >= done:
                    yield batch
                made += 1
                if made == self.steps:
                    return
            if made == made_before:
                raise ValueError(
                    f"process {self.dataset.share.rank} has fewer than {self.batch_size} images of "
                    f"{self.dataset.origin}: take a smaller batch_size or more shards"
                )
            again += 1

    def _whole_batches(self) -> Iterator[Batch]:
        """Yield whole batches, with empty ones that are not needed, and the rest in evaluation."""
        rest: list[Batch] = []
        for batch in DataLoader.__iter__(self):  # of each worker in turn
            if not batch or len(batch["labels"]) == self.batch_size:
                yield batch
            else:
                rest.append(batch)
        if not rest:
            return
        joined = {name: torch.cat([part[name] for part in rest]) for name in rest[0]}
        for start in range(0, len(joined["labels"]), self.batch_size):
            batch = {
                name: values[start : start + self.batch_size] for name, values in joined.items()
            }
            if self.steps is None or len(batch["labels"]) == self.batch_size:
                yield batch


def count_rows(dataset: str, name: str | None, revision: str | None, split: str) -> int | None:
    """Number of rows of a split by the dataset's card or its parquet footers; None if unknown."""
    builder = load_dataset_builder(dataset, name, revision=revision)
    known = (builder.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return known.num_examples
    files = list((builder.config.data_files or {}).get(split, []))
    if not files or not all(file.endswith(".parquet") for file in files):
        return None
    count = 0
    for file in files:
        with fsspec.open(file, "rb") as opened:
            count += pyarrow.parquet.read_metadata(opened).num_rows
    return count
