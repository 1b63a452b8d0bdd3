"""Millions of images as vectors, by Lightning: any number of devices and nodes, each image once."""

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

EVERY_N_SECONDS = 60.0  # between two lines on how far it is, where nobody watches


@dataclass
class EmbeddingRun:
    """All that decides what is written, the same in every process.

    Attributes:
        source: of the images.
        embedder: makes their vectors.
        reader: decodes them for it.
        folder: that the vectors go to.
        features: of its rows.
        settings, record: see :meth:`.VectorFolder.begin`.
        batch_size: images that the model takes at once.
        num_workers: processes that decode images, for each process that embeds them.
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
        """The images of some units."""
        return UnitBatches(
            self.source,
            units,
            self.reader,
            batch_size=self.batch_size,
            on_bad_image=self.on_bad_image,
        )

    def writer(self) -> ShardWriter:
        """What writes the rows."""
        return ShardWriter(self.folder, self.features, self.embedder.labels)


class ToldToStop(Exception):
    """A signal ended a run (SIGTERM); the same command goes on from the shards that are there."""


class EmbeddingModule(L.LightningModule):
    """Predicts vectors."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder = embedder

    def predict_step(self, batch: UnitBatch, batch_idx: int) -> list[Embedded]:
        """The vectors of a batch; nothing for a batch of which no image could be read."""
        return [] if batch.pixel_values is None else [self.embedder(batch.pixel_values)]


class UnitsData(L.LightningDataModule):
    """Hands each process its share of the units that have no shard yet.

    Attributes:
        pending: numbers of all units that have none.
    """

    trainer: L.Trainer

    def __init__(self, run: EmbeddingRun):
        super().__init__()
        self.run = run
        self.pending: list[int] = []
        self._lock: FolderLock | None = None

    def setup(self, stage: str) -> None:
        """Take the folder, by the first process, and learn what is to be done.

        Raises:
            RuntimeError: if another run writes there.
            ValueError, FileExistsError, OSError: as :meth:`.VectorFolder.begin` does.
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
        run.folder.check(run.settings)  # before a lock is put there
        lock = FolderLock(run.folder.path, "output")
        lock.acquire()
        self._lock = lock
        return run.folder.begin(run.settings, run.record, run.source.num_units)

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def predict_dataloader(self) -> DataLoader:
        trainer = self.trainer
        own = self.pending[trainer.global_rank :: trainer.world_size]
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return load_units(self.run.batches(own), self.run.num_workers, pin_memory=on_gpu)


class WriteShards(Callback):
    """Writes what the module predicts, and in the end the manifest.

    Attributes:
        manifest: of the finished run.
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
                "another process has ended, by an error that it tells itself: the shards that are "
                "there are complete, and the same command goes on from them"
            ) from error
        run = self.run
        self.manifest = by_the_first(trainer, lambda: run.folder.finish(run.source.num_units))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._writer.close()

    def on_exception(self, *args: Any) -> None:
        self._writer.close()


@dataclass(eq=False)
class Pace(Callback):
    """How far a run is and how fast: a bar on a terminal, else a line now and then.

    Speed is of all processes, as far as the first one can tell of its own. The first batch counts
    for neither speed nor waiting: workers start in it.

    Attributes:
        total: images that are to be embedded, if that is known.
        images: that this process has embedded.
        seconds: since the first batch.
        waited: seconds of them that the model had no images to work on.
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
        """Images per second of this process; ``None`` before there is one."""
        return self._timed / self.seconds if self.seconds else None

    @property
    def share_waited(self) -> float | None:
        """Part of the time that the model had no images."""
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
    """What became of a run.

    Attributes:
        manifest: of the folder.
        pace: how fast it went.
        is_first: whether this is the first process.
        device: that it had.
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
        make_trainer: a trainer with some callbacks.

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
    """About how many images have no vector yet."""
    total, units = run.source.num_images, run.source.num_units
    return None if total is None else round(total * (1 - len(run.folder.done()) / max(units, 1)))
