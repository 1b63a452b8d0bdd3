"""Reports about a training: loggers, speed, progress lines, pictures, and a final summary."""

import importlib.util
import json
import math
import re
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.amounts import add_up, amount_text, sweep
from lightning_modules.lightning_private import accumulates, logs, stop_workers
from mctf_hf.checks import check_range
from mctf_hf.cost import multiply_accumulates
from mctf_hf.files import replace, write_text
from mctf_hf.images import to_image
from mctf_hf.problems import Quality, quality
from mctf_hf.registry import NO_FUSION
from mctf_hf.visualization import FusedTokens, contact_sheet, enlarge


def make_loggers(
    folder: str = "outputs", name: str = "runs", wandb: str | None = None
) -> list[Logger]:
    """Loggers for TensorBoard and CSV, in ``folder/name/version_…``, and for Weights & Biases.

    Args:
        folder: folder of all runs.
        name: name of this kind of run.
        wandb: project of Weights & Biases to log to, too; this needs the package ``wandb``.

    Raises:
        ValueError: if ``wandb`` is set, but the package is not installed.
    """
    tensorboard = TensorBoardLogger(folder, name)
    loggers: list[Logger] = [tensorboard, CSVLogger(folder, name, tensorboard.version)]
    if wandb is not None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"log.wandb={wandb!r} needs the package wandb, which is not installed: "
                "pip install 'mctf-hf[wandb]', or leave it unset"
            )
        loggers.append(WandbLogger(name=name, project=wandb, save_dir=folder))
    return loggers


class Watch(Callback):
    """Logs the number of tokens after each layer, and the training speed in images per second.

    The speed of all processes is the mean since it was last logged. It includes waiting for data,
    but not validation and checkpoints.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._images = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        config = pl_module.model.config
        left = config.num_tokens() - np.cumsum(config.tokens_fused(config.num_tokens()))
        counts = {f"tokens/after_layer_{i}": float(n) for i, n in enumerate(left)}
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=trainer.global_step)

    def on_train_batch_start(self, *args: Any) -> None:
        if self._since is None:
            self._since, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        assert self._since is not None
        self._images += len(batch["labels"]) * trainer.world_size
        speed = self._images / (time.perf_counter() - self._since)
        pl_module.log("train/images_per_second", speed, batch_size=1)
        if not accumulates(trainer) and logs(trainer):
            self._since = None

    def on_validation_start(self, *args: Any) -> None:
        self._since = None

    def on_save_checkpoint(self, *args: Any) -> None:
        self._since = None


class ProgressLines(Callback):
    """Prints progress lines at fixed intervals and after each epoch, if there is no terminal.

    Args:
        every_n_seconds: seconds between two lines within an epoch; the first line comes after the
            first batch. 0 prints no lines.
        terminal: whether there is a terminal, which shows a progress bar instead. Unset: detect it.
    """

    def __init__(self, every_n_seconds: float = 60.0, terminal: bool | None = None):
        check_range(0, every_n_seconds=every_n_seconds)
        self.every_n_seconds = every_n_seconds
        self.terminal = Console().is_terminal if terminal is None else terminal
        self._begun = self._told = -math.inf
        self._first_step = 0

    @property
    def writes(self) -> bool:
        """Whether lines are printed."""
        return bool(self.every_n_seconds) and not self.terminal

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun, self._told = time.perf_counter(), -math.inf
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._due and not accumulates(trainer):
            self._write(trainer, f"epoch {trainer.current_epoch + 1}", "train/loss")

    @property
    def _due(self) -> bool:
        return self.writes and time.perf_counter() - self._told >= self.every_n_seconds

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            self._count(trainer, "validation", trainer.num_val_batches, *args)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer, "test", trainer.num_test_batches, *args)

    def on_predict_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer, "prediction", trainer.num_predict_batches, *args)

    def _count(
        self,
        trainer: L.Trainer,
        what: str,
        batches: list[int | float],
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
        *args: Any,
    ) -> None:
        if self._due and trainer.is_global_zero:
            self._told = time.perf_counter()
            print(f"{what}: batch {index + 1} of {sum(batches)}", flush=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = trainer.callback_metrics  # in all processes, because it may synchronise them
        if self.writes:
            names = sorted(name for name in found if re.fullmatch("val/[^/]+", name))
            self._write(trainer, f"end of epoch {trainer.current_epoch + 1}", "train/loss", *names)

    def _write(self, trainer: L.Trainer, epoch: str, *names: str) -> None:
        if not trainer.is_global_zero:
            return
        self._told = time.perf_counter()
        found, step = trainer.callback_metrics, trainer.global_step
        last, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
        parts = [
            f"{epoch} of {epochs}" if epochs is not None and epochs > 0 else epoch,
            f"step {step} of {last}" if math.isfinite(last) else f"step {step}",
            *(f"{name} {float(found[name]):.4g}" for name in names if name in found),
        ]
        if (speed := found.get("train/images_per_second")) is not None:
            parts.append(f"{float(speed):,.0f} images/s")
        done = step - self._first_step
        if done and step < last < math.inf:
            left = (last - step) / done * (self._told - self._begun)
            parts.append(f"{timedelta(seconds=round(left))} left")
        print(", ".join(parts), flush=True)


class FusedTokensPicture(Callback):
    """Draws the fused tokens of the first validation images at fixed intervals.

    Pictures are written to ``fused_tokens/`` in the log directory, and to TensorBoard and Weights &
    Biases if these loggers are used.

    Args:
        every_n_epochs: epochs between two pictures; 0 draws none.
        images: number of images.
    """

    def __init__(self, every_n_epochs: int = 5, images: int = 4):
        check_range(0, every_n_epochs=every_n_epochs)
        check_range(1, images=images)
        self.every_n_epochs = every_n_epochs
        self.images = images

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        due = self.every_n_epochs and trainer.current_epoch % self.every_n_epochs == 0
        trial = trainer.sanity_checking or trainer.fast_dev_run
        fitting = trainer.state.fn == "fit" and not trial
        if not due or not fitting or batch_idx or pl_module.model.config.reduction == "none":
            return
        images = batch["pixel_values"][: self.images]
        # In all processes, because each may hold only a part of the weights.
        output = pl_module(images, output_fusion=True)
        log_dir = trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            sheet = _picture(pl_module, images, output)
            path = Path(log_dir, "fused_tokens", f"epoch={trainer.current_epoch}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, sheet.save)
            for logger in trainer.loggers:
                _log_picture(logger, sheet, trainer.global_step)


def _picture(pl_module: Any, images: Tensor, output: Any) -> Image.Image:
    """Draw images (b, channels, height, width) beside their fused tokens."""
    config = pl_module.model.config
    rows, columns = config.grid(tuple(images.shape[-2:]))
    seen = [
        FusedTokens(
            view=to_image(pl_module.image_processor, image),
            groups=groups.view(rows, columns).cpu().numpy(),
            num_tokens=output.assignment.shape[1],
            tokens_left=output.token_sizes.shape[1],
        )
        for image, groups in zip(
            images, output.assignment[:, config.num_prefix_tokens :], strict=True
        )
    ]
    captions = [f"{seen[0].num_tokens} tokens", f"{seen[0].tokens_left} tokens"]
    return contact_sheet(captions, [[enlarge(one.view), one.picture()] for one in seen])


def _log_picture(logger: Logger, picture: Image.Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("fused_tokens", np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image("fused_tokens", [picture], step=step)


class Summary(Callback):
    """Reports the final model's validation quality and cost at several amounts of reduction.

    This callback must come after the one that sets the final weights. It prints a table and writes
    it to ``summary.json`` in the log directory.

    Args:
        enabled: whether to make the summary.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loader = trainer.val_dataloaders
        if not self.enabled or trainer.fast_dev_run or trainer.interrupted or loader is None:
            return
        log_dir = trainer.log_dir or trainer.default_root_dir
        try:
            rows = self._measure(trainer, pl_module, loader)
        finally:
            stop_workers(loader)
        if trainer.is_global_zero:
            Console().print(_table(rows, quality(pl_module.model.config)))
            write_json(Path(log_dir, "summary.json"), rows)

    def _measure(self, trainer: L.Trainer, pl_module: Any, loader: Any) -> list[dict[str, Any]]:
        model, device = pl_module.model, trainer.strategy.root_device
        settings = sweep(model.config)
        own = settings[0]
        if NO_FUSION not in settings:
            settings = [NO_FUSION, *settings]
        (most,) = trainer.num_val_batches  # infinite for a stream
        batches = loader if math.isinf(most) else islice(loader, int(most))
        sums, total = add_up(model.to(device).eval(), batches, settings)
        counts = torch.tensor([*sums.tolist(), total], device=device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(counts)
        model.cpu()
        *found, images = counts.tolist()
        if not images:
            raise ValueError("summary: none of the validation images can be read")
        judged = quality(model.config)
        rows = [
            {
                **amount,
                "own": amount == own,
                f"val_{judged.name}": number / images,
                "gmacs": multiply_accumulates(model.config, **amount) / 1e9,
                "images": int(images),
            }
            for amount, number in zip(settings, found, strict=True)
        ]
        return sorted(rows, key=lambda row: -row["gmacs"])


def _table(rows: list[dict[str, Any]], judged: Quality) -> Table:
    table = Table(title=f"The final model on {rows[0]['images']} validation images")
    for heading in ("setting", judged.name.replace("_", " "), "GMACs", "saved"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        setting = amount_text({name: row[name] for name in ("r", "keep_rate") if name in row})
        table.add_row(
            f"{setting}, as configured" if row["own"] else setting,
            judged.text(row[f"val_{judged.name}"], digits=1),
            f"{row['gmacs']:.4f}",
            f"{100 * (1 - row['gmacs'] / rows[0]['gmacs']):.0f}%",
        )
    return table


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")
    rank_zero_info(f"Summary: {path}")
