"""Callbacks for averaged weights and for checkpoints that survive kills, full disks and signals."""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.checkpoint_files import LAST, PREVIOUS, SafeCheckpointIO
from lightning_modules.lightning_private import (
    BegunAverage,
    accumulates,
    epoch_goes_on,
    metrics_so_far,
    saves_shards,
)
from lightning_modules.locks import FolderLock
from lightning_modules.run_settings import check_resumable, training_settings_of
from mctf_hf.checks import check_range
from mctf_hf.files import replace

SETTINGS = "settings"  # key of a checkpoint for the settings of its run

T = TypeVar("T")


def in_shards(trainer: L.Trainer) -> bool:
    """Whether each process holds only a part of the weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def is_there(trainer: L.Trainer, path: str) -> bool:
    """Whether process 0 finds a checkpoint, or it has a URL; all processes must call this."""
    return trainer.strategy.broadcast("://" in path or os.path.exists(path))


def by_the_first(trainer: L.Trainer, work: Callable[[], T]) -> T:
    """Run ``work`` in process 0. All processes must call this and get its result or its error."""
    found: Any = None
    failed = None
    if trainer.is_global_zero:
        try:
            found = work()
        except Exception as error:
            failed = error
    found, failed = trainer.strategy.broadcast((found, failed))
    if failed is not None:
        raise failed
    return found


class BestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that remembers the best checkpoint if a resumed run logs to another folder.

    If that file no longer exists, the best of the following checkpoints counts. If the metric of
    ``monitor`` does not exist, ValueError is raised before training or after its first step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_fit_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._forget_what_is_gone(trainer)

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._forget_what_is_gone(trainer)  # sharded models are restored after on_fit_start

    def on_sanity_check_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not str(self.monitor).startswith("train/"):
            self._check_monitor(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 0 and str(self.monitor).startswith("train/"):
            self._check_monitor(trainer)
        super().on_train_batch_end(trainer, *args, **kwargs)

    def _check_monitor(self, trainer: L.Trainer) -> None:
        found = metrics_so_far(self, trainer)
        known = [name for name in found if name.count("/") < 2]
        if self.monitor not in (None, *found):
            raise ValueError(
                f"best.monitor={self.monitor!r} is not allowed: there is no such metric, only "
                f"{', '.join(sorted(known))}"
            )

    def _forget_what_is_gone(self, trainer: L.Trainer) -> None:
        lost = self.best_model_path
        if not lost or is_there(trainer, lost):
            return
        rank_zero_warn(f"The best checkpoint so far, {lost}, is gone: the best from here on counts")
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = None
        self.best_k_models = {}
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)


class Stopped(SIGTERMException):
    """Error that ends a run after a stop signal.

    Attributes:
        signum: number of the signal.
        step: number of completed optimizer steps.
        checkpoint: file with the state of the run; ``None`` if no checkpoints are kept.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None):
        self.signum, self.step, self.checkpoint = signum, step, checkpoint
        advice = f"go on from there with --ckpt_path {checkpoint}"
        super().__init__(f"{self.reason}: {advice if checkpoint else 'no checkpoint was kept'}")

    @property
    def reason(self) -> str:
        return f"told to stop ({signal.Signals(self.signum).name}) at step {self.step}"


class LastCheckpoint(Checkpoint):
    """Saves the latest state in ``last.ckpt``, and keeps the state before it in ``previous.ckpt``.

    Saves at fixed step intervals, after each epoch, and when a signal stops the run: SIGTERM, which
    batch systems send before they take a machine away, or SIGINT (Ctrl-C; a second one stops the
    run at once, without saving). A run resumed from any saved state ends with the same weights as
    an uninterrupted run. So no state is saved between batches whose gradients are accumulated, or
    before a validation that the resumed run would skip. A lock on the folder keeps other runs from
    writing to it. If a run is resumed with other settings, a warning or an error lists them.

    Args:
        every_n_train_steps: optimizer steps between two saves.
        folder: folder of the two files. Unset: the folder of the other checkpoints.
        use_previous: whether to resume from ``previous.ckpt`` if ``last.ckpt`` cannot be read.
    """

    def __init__(
        self, every_n_train_steps: int = 100, folder: str | None = None, use_previous: bool = False
    ):
        check_range(1, every_n_train_steps=every_n_train_steps)
        self.every_n_train_steps = every_n_train_steps
        self.folder = folder
        self.use_previous = use_previous
        self._saved_step = 0
        self._lock: FolderLock | None = None
        self._signal: int | None = None
        self._stop_after_step = False
        self._handlers: dict[signal.Signals, Any] = {}  # set before those of the trainer and ours

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        files = SafeCheckpointIO(self.use_previous)
        if in_shards(trainer):
            if saves_shards(trainer.strategy):
                raise ValueError(
                    "trainer.strategy: save_distributed_checkpoint=True is not allowed: a "
                    "checkpoint is a single file, set it to false"
                )
            _load_after_check(trainer, files)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = files

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[SETTINGS] = training_settings_of(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and SETTINGS in checkpoint:
            check_resumable(
                checkpoint[SETTINGS], training_settings_of(trainer, pl_module), trainer.ckpt_path
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        path = self.path(trainer)
        if path is not None and not trainer.fast_dev_run:
            self._lock = FolderLock(path.parent, "last.folder" if self.folder else "best.dirpath")
            by_the_first(trainer, self._lock.acquire)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._remember:
                signal.signal(signum, handler)
        if self._lock is not None:
            self._lock.release()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        # These replace Lightning's handlers, which communicate with other processes inside the
        # handler, or abandon the step.
        if threading.current_thread() is threading.main_thread():
            for signum in self._handlers:
                signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._signal is not None:
                signal.default_int_handler(signum, frame)
            os.write(2, b"\nThis step ends, then its state is saved. Ctrl-C again stops at once.\n")
        self._signal = signum

    def _stopping(self, trainer: L.Trainer) -> bool:
        """Whether any process received a stop signal; all processes must call this together."""
        if trainer.world_size == 1:
            return self._signal is not None
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.world_size > 1:  # here, where the module waits for the loss anyway
            self._stop_after_step = self._stopping(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if accumulates(trainer) or not epoch_goes_on(trainer):
            return  # a later hook saves and stops
        alone = trainer.world_size == 1
        stopping = self._signal is not None if alone else self._stop_after_step
        every = self.every_n_train_steps
        if stopping or trainer.global_step // every > self._saved_step // every:
            self._save(trainer)
        if stopping:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._stopping(trainer):
            self._stop(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SIGTERMException) and trainer.validating:
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()  # the resumed run repeats the validation: started, no batch finished
            progress.total.ready = progress.total.started = 1
            self._save(trainer)
        self.teardown()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        if self._stopping(trainer):
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        raise Stopped(self._signal or signal.SIGTERM, trainer.global_step, self.path(trainer))

    def path(self, trainer: L.Trainer) -> Path | None:
        """Path of ``last.ckpt``; None if no checkpoints are kept."""
        folder = self.folder or getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(folder, LAST) if folder else None

    def _save(self, trainer: L.Trainer) -> None:
        path = self.path(trainer)
        if path is None or trainer.fast_dev_run:
            return
        self._saved_step = trainer.global_step
        new = path.with_name("next.ckpt")
        trainer.save_checkpoint(new, weights_only=False)
        if trainer.is_global_zero:
            _keep_previous(path)
            _move(new, path)
        trainer.strategy.barrier("LastCheckpoint")


def _load_after_check(trainer: L.Trainer, files: SafeCheckpointIO) -> None:
    """Let a strategy that does not use ``checkpoint_io`` check checkpoints before it loads them."""
    strategy: Any = trainer.strategy
    load = strategy.load_checkpoint

    def checked(path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load(by_the_first(trainer, lambda: files.whole_one(path)), *args, **kwargs)

    strategy.load_checkpoint = checked


def _keep_previous(path: Path) -> None:
    """Keep a checkpoint as ``previous.ckpt``: by a hard link or, if that fails, by moving it."""
    if not path.exists():
        return
    previous = path.with_name(PREVIOUS)
    try:
        replace(previous, lambda link: os.link(path, link))
    except OSError:  # the disk has no hard links, or the checkpoint is a folder of shards
        _move(path, previous)


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


class AveragedWeights(BegunAverage):
    """Exponential moving average of the weights, used for validation, export and best checkpoint.

    Args:
        decay: weight of the old average in each update. Unset: no average.
        every_n_steps: optimizer steps between two updates.
        from_step: zero-based optimizer step from which on the average is updated.
    """

    def __init__(self, decay: float | None = None, every_n_steps: int = 1, from_step: int = 0):
        check_range(1, every_n_steps=every_n_steps)
        check_range(0, from_step=from_step)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is not allowed: it must be at least 0 and below 1")
        self.decay = decay
        super().__init__(
            decay=decay or 0.0,
            update_every_n_steps=every_n_steps,
            update_starting_at_step=from_step,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if in_shards(trainer):
            raise ValueError(
                f"ema.decay={self.decay!r} is not allowed with weights in shards: use "
                "--trainer.strategy ddp, or leave it unset"
            )
        with warnings.catch_warnings():  # the warning is for sharded models
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging")
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if "current_model_state" in checkpoint and not self.begun:
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.swap_back(pl_module)  # in a validation, the module holds the average

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.hand_over(pl_module)  # on_train_end is not called if a finished run was resumed
