"""Uses of private names of Lightning."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import combined_loader
from torch import Tensor

from mctf_hf.dependencies import check_names

check_names(
    "lightning",
    {
        "lightning.pytorch.LightningModule": ("_trainer",),
        "lightning.pytorch.Trainer": ("_logger_connector",),
        "lightning.pytorch.callbacks.ModelCheckpoint": ("_monitor_candidates",),
        "lightning.pytorch.callbacks.WeightAveraging": (
            "_average_model",
            "_copy_average_to_current",
            "_swap_models",
        ),
        "lightning.pytorch.loops._FitLoop": ("_data_fetcher", "_should_accumulate"),
        "lightning.pytorch.loops._TrainingEpochLoop": ("_is_training_done", "_should_check_val_fx"),
        "lightning.pytorch.strategies.ModelParallelStrategy": ("_save_distributed_checkpoint",),
        "lightning.pytorch.utilities.combined_loader": ("_shutdown_workers_and_reset_iterator",),
        "lightning.pytorch.trainer.connectors.logger_connector._LoggerConnector": (
            "should_update_logs",
        ),
    },
)


def has_trainer(module: L.LightningModule) -> bool:
    return module._trainer is not None


def metrics_so_far(checkpoint: ModelCheckpoint, trainer: L.Trainer) -> dict[str, Tensor]:
    """Metrics that a checkpoint can monitor at this point."""
    return checkpoint._monitor_candidates(trainer)


def accumulates(trainer: L.Trainer) -> bool:
    """Whether this training batch only accumulates gradients, without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def logs(trainer: L.Trainer) -> bool:
    """Whether loggers receive the metrics of this training batch."""
    return trainer._logger_connector.should_update_logs


def epoch_goes_on(trainer: L.Trainer) -> bool:
    """Whether another training batch follows this one, without a validation in between."""
    loop = trainer.fit_loop
    fetcher: Any = loop._data_fetcher
    epoch = loop.epoch_loop
    return not (epoch._is_training_done or epoch._should_check_val_fx(fetcher))


def stop_workers(loader: Any) -> None:
    """Stop the persistent workers of a loader, which would otherwise wait until it is deleted."""
    combined_loader._shutdown_workers_and_reset_iterator(loader)


def saves_shards(strategy: Any) -> bool:
    """Whether each process saves its own shards of the weights in a checkpoint."""
    return strategy._save_distributed_checkpoint


class BegunAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, without effect on weights before its first update.

    Attributes:
        swapped: whether the module holds the average instead of its own weights.
    """

    swapped = False

    @property
    def begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged)

    def swap_back(self, module: L.LightningModule) -> None:
        """Restore the module's own weights if it holds the average."""
        if self.swapped:
            self._swap_models(module)

    def hand_over(self, module: L.LightningModule) -> None:
        """Copy the average to the module's weights."""
        self._copy_average_to_current(module)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        if self.begun:
            super()._swap_models(pl_module)
            self.swapped = not self.swapped

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        if self.begun:
            super()._copy_average_to_current(pl_module)
