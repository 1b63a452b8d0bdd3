"""``mctf benchmark-data``: speed of the input pipeline without a model, in images per second."""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table
from transformers import ViTImageProcessorPil

from lightning_modules import HFImageDataModule
from lightning_modules.image_task import ImageTask
from mctf_hf.checks import check_range

from .measuring import machine_name
from .parsing import ArgumentParser

WHOLE_BATCH = {"rand_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
UNUSED = {"test_split", "predict_folder", "eval_batch_size"}  # unused in training


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
    """Images per second of training batches, from disk to device, augmented and normalised.

    Args:
        data: arguments of ``HFImageDataModule``.
        image_size: height and width of the images in the batches.
        batches: number of timed batches, over as many epochs as needed.
        warmup: number of untimed batches before them, while workers start and fill their queues.
        num_labels: number of classes.
        accelerator: type of the device that augments whole batches.

    Raises:
        ValueError: for an image size or a number of batches below 1.
    """
    check_range(1, image_size=image_size, batches=batches, warmup=warmup)
    fabric = Fabric(accelerator=accelerator, devices=1)
    module = HFImageDataModule(**data)
    processor = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    module.open("fit", ImageTask(processor, num_labels))
    try:
        made = (
            module.augment(fabric.to_device(module.on_before_batch_transfer(batch, 0)))
            for batch in chain.from_iterable(repeat(module.training_loader()))
        )
        _, start = _take(made, warmup, fabric.device)
        images, end = _take(made, batches, fabric.device)
    finally:
        module.teardown("fit")
    return images / (end - start)


def _take(batches: Iterator[dict[str, Any]], count: int, device: torch.device) -> tuple[int, float]:
    """Take some batches: the number of their images, and the time when the device is done."""
    images = sum(len(batch["labels"]) for batch in islice(batches, count))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images, time.perf_counter()
