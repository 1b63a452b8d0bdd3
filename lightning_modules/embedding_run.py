"""Embedding of large image collections with Lightning, on any number of devices and nodes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import lightning as L
import torch
from datasets import Features
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.data import DataLoader

from mctf_hf.embedding import Embedded, Embedder
from mctf_hf.images import ImageReader, OnBadImage

from .checkpoints import by_the_first
from .image_units import ImageSource
from .locks import FolderLock
from .unit_batches import UnitBatches, load_units
from .vector_folder import ShardWriter, UnitBatch, VectorFolder

EVERY_N_SECONDS = 60.0  # interval of progress lines without a terminal


@dataclass
class EmbeddingRun:
    """Everything that determines the output of a run, the same in every process.

    Attributes:
        source: image collection.
        embedder: computes the vectors.
        reader: decodes the images for the embedder.
        folder: output folder of the vectors.
        features: columns of the output rows.
        settings, record: see :meth:`.VectorFolder.begin`.
        batch_size: images per call of the model.
        num_workers: decoding processes for each embedding process.
        on_bad_image: see :class:`.UnitBatches`.
    """

    source: ImageSource
    embedder: Embedder
    reader: ImageReader
    folder: VectorFolder
    features: Features
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    batch_size: int
    num_workers: int
    on_bad_image: OnBadImage

    def batches(self, units: list[int]) -> UnitBatches:
        """Batches of the images of some units."""
        return UnitBatches(
            self.source,
            units,
            self.reader,
            batch_size=self.batch_size,
            on_bad_image=self.on_bad_image,
        )

    def writer(self) -> ShardWriter:
        """Create a writer of the output rows."""
        return ShardWriter(self.folder, self.features, self.embedder.labels)


class ToldToStop(Exception):
    """Error for a run that SIGTERM ended; the same command continues from the existing shards."""


class EmbeddingModule(L.LightningModule):
    """Lightning module that predicts vectors."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder = embedder

    def predict_step(self, batch: UnitBatch, batch_idx: int) -> list[Embedded]:
        """The vectors of a batch; an empty list if no image of the batch could be read."""
        return [] if batch.pixel_values is None else [self.embedder(batch.pixel_values)]


class UnitsData(L.LightningDataModule):
    """Gives each process its share of the units without a shard.

    Attributes:
        pending: numbers of all units without a shard.
    """

    trainer: L.Trainer

    def __init__(self, run: EmbeddingRun):
        super().__init__()
        self.run = run
        self.pending: list[int] = []
        self._lock = FolderLock(run.folder.path, "output")

    def setup(self, stage: str) -> None:
        """Lock and prepare the folder in process 0, and find the pending units.

        Raises:
            RuntimeError: if another run writes to the folder.
            ValueError, FileExistsError, OSError: see :meth:`.VectorFolder.begin`.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                "trainer.strategy: ModelParallelStrategy is not allowed, where processes may have "
                "unequal numbers of batches: use ddp"
            )
        self.pending = by_the_first(self.trainer, self._begin)

    def _begin(self) -> list[int]:
        run = self.run
        run.folder.check(run.settings)  # before the lock writes files to it
        self._lock.acquire()
        return run.folder.begin(run.settings, run.record, run.source.num_units)

    def release(self) -> None:
        """Release the lock of the folder."""
        self._lock.release()

    def predict_dataloader(self) -> DataLoader:
        trainer = self.trainer
        own = self.pending[trainer.global_rank :: trainer.world_size]
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return load_units(self.run.batches(own), self.run.num_workers, pin_memory=on_gpu)


class WriteShards(Callback):
    """Writes the predicted vectors to shards, and finally the manifest.

    Attributes:
        manifest: manifest of the finished run.
    """

    def __init__(self, run: EmbeddingRun):
        self.run = run
        self.manifest: dict[str, Any] = {}
        self._writer = run.writer()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Embedded],
        batch: UnitBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._writer.add(batch, *outputs)
        if trainer.received_sigterm:
            raise ToldToStop

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            trainer.strategy.barrier("mctf embed: all shards are written")
        except RuntimeError as error:
            raise RuntimeError(
                "another process has ended with an error, which it reports itself: the shards "
                "written so far are complete, and the same command goes on from them"
            ) from error
        run = self.run
        self.manifest = by_the_first(trainer, lambda: run.folder.finish(run.source.num_units))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._writer.close()

    def on_exception(self, *args: Any) -> None:
        self._writer.close()


@dataclass(eq=False)
class Pace(Callback):
    """Shows progress and speed of a run: a bar on a terminal, otherwise lines at fixed intervals.

    Progress and speed of all processes are estimated from process 0. Speed and waiting time do not
    include the first batch, during which the workers start.

    Attributes:
        total: number of images to embed, if known.
        images: number of images that this process has finished, including unreadable ones.
        seconds: time between the end of the first and the last batch so far.
        waited: seconds of this time in which the model waited for images.
    """

    console: Console
    total: int | None = None
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    _timed: int = 0
    _begun: float | None = None
    _ready: float = 0.0
    _told: float = 0.0
    _bar: Progress | None = None
    _task: Any = None
    _clock: Callable[[], float] = field(default=time.perf_counter)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._told = self._clock()
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.completed:,.0f} images{task.fields[rest]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, rest="")

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._begun is not None:
            self.waited += self._clock() - self._ready

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: UnitBatch,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._ready = self._clock()
        done = len(batch.ids) + len(batch.unreadable)
        self.images += done
        if self._begun is None:
            self._begun = self._ready
        else:
            self._timed += done
            self.seconds = self._ready - self._begun
        if trainer.is_global_zero:
            self._tell(trainer.world_size)

    @property
    def speed(self) -> float | None:
        """Images per second of this process; ``None`` until it is known."""
        return self._timed / self.seconds if self.seconds else None

    @property
    def share_waited(self) -> float | None:
        """Fraction of the time in which the model waited for images; ``None`` until it is known."""
        return self.waited / self.seconds if self.seconds else None

    def _tell(self, processes: int) -> None:
        done, rest = self.images * processes, ""
        if self.speed:
            rest = f", {processes * self.speed:,.1f} images/s"
            if self.total is not None:
                left = max(0.0, self.total - done) / (processes * self.speed)
                rest += f", {timedelta(seconds=round(left))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rest=rest)
        elif self._clock() - self._told >= EVERY_N_SECONDS:
            self._told = self._clock()
            of = "" if self.total is None else f" of {self.total:,}"
            self.console.print(f"{done:,}{of} images{rest}", highlight=False)

    def on_predict_end(self, *args: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *args: Any) -> None:
        self.on_predict_end()


class Embedding(NamedTuple):
    """Result of a run in one process.

    Attributes:
        manifest: manifest of the folder.
        pace: progress and speed.
        is_first: whether this is process 0.
        device: device of the process.
    """

    manifest: dict[str, Any]
    pace: Pace
    is_first: bool
    device: torch.device


def embed_by_lightning(
    run: EmbeddingRun, make_trainer: Callable[[list[Callback]], L.Trainer], console: Console
) -> Embedding:
    """Embed all images of a run that have no vector yet.

    Args:
        make_trainer: creates a trainer with the given callbacks.

    Raises:
        ValueError, OSError, RuntimeError: see :class:`UnitsData` and :class:`.ShardWriter`.
    """
    data, pace, shards = UnitsData(run), Pace(console, total=_left(run)), WriteShards(run)
    trainer = make_trainer([pace, shards])
    try:
        with torch.inference_mode():
            trainer.predict(EmbeddingModule(run.embedder), data, return_predictions=False)
    finally:
        data.release()
    device = trainer.strategy.root_device
    return Embedding(shards.manifest, pace, trainer.is_global_zero, device)


def _left(run: EmbeddingRun) -> int | None:
    """Estimated number of images without a vector; None if the total is unknown."""
    total, units = run.source.num_images, run.source.num_units
    return None if total is None else round(total * (1 - len(run.folder.done()) / max(units, 1)))
