"""``mctf benchmark-data``: how many images per second the input pipeline delivers, by itself."""

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from transformers import ViTImageProcessorPil

from lightning_modules import HFImageDataModule
from mctf_hf.checks import check_range

from .measuring import machine_name
from .parsing import ArgumentParser

WHOLE_BATCH = {"rand_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
UNUSED = {"test_split", "predict_folder", "eval_batch_size"}  # of data that nobody trains with


def main(args: Sequence[str]) -> None:
    """Read the command line and print a table of speeds."""
    parser = ArgumentParser(
        prog="mctf benchmark-data",
        description="Time the training batches of a dataset without a model: the settings of "
        "`mctf fit`'s data are there.",
    )
    parser.add_class_arguments(HFImageDataModule, "data", skip=UNUSED)
    parser.add_function_arguments(images_per_second, skip={"data"})
    settings = parser.parse_args(list(args)).as_dict()
    data = settings.pop("data")
    table = Table(title=f"{data['num_workers']} workers, {machine_name()}")
    table.add_column("input pipeline")
    table.add_column("images/s", justify="right")
    runs = {"decode, crop, flip, normalize": data | WHOLE_BATCH}
    if data != data | WHOLE_BATCH:
        runs["and augment whole batches"] = data
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for name, chosen in runs.items():
            table.add_row(name, f"{images_per_second(chosen, **settings):,.0f}")
    finally:
        logger.setLevel(level)
    Console().print(table)


def images_per_second(
    data: dict[str, Any],
    image_size: int = 224,
    batches: int = 20,
    warmup: int = 4,
    num_labels: int = 1000,
    accelerator: str = "cpu",
) -> float:
    """Time training batches from the disk to the device, augmented and normalised.

    Args:
        data: arguments of ``HFImageDataModule``.
        image_size: height and width of the images that come out.
        batches: how many are timed, over as many epochs as that takes.
        warmup: batches before, in which workers start and fill their queues.
        num_labels: classes.
        accelerator: where whole batches are augmented.

    Raises:
        ValueError: for a number below 1.
    """
    check_range(1, image_size=image_size, batches=batches, warmup=warmup)
    stopwatch = _Stopwatch(image_size, num_labels, warmup)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is trained
        trainer = L.Trainer(
            default_root_dir=Path(folder),
            accelerator=accelerator,
            devices=1,
            max_steps=-1,
            max_epochs=warmup + batches,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_StopAfter(warmup + batches)],
        )
        trainer.fit(stopwatch, HFImageDataModule(**data))
    return stopwatch.images / (stopwatch.end - stopwatch.start)


class _Stopwatch(L.LightningModule):
    """Takes batches and the time, and trains nothing."""

    def __init__(self, image_size: int, num_labels: int, warmup: int):
        super().__init__()
        self.image_processor = ViTImageProcessorPil(
            size={"height": image_size, "width": image_size}
        )
        self.num_labels = num_labels
        self.warmup = warmup
        self.seen = self.images = 0
        self.start = self.end = 0.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.end = time.perf_counter()
        self.seen += 1
        if self.seen == self.warmup:
            self.start = self.end
        elif self.seen > self.warmup:
            self.images += len(batch["pixel_values"])

    def configure_optimizers(self) -> None:
        return None


class _StopAfter(L.Callback):
    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        trainer.should_stop = pl_module.seen >= self.batches
