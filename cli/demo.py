"""``mctf demo``: trains, fuses, finetunes and compares small models of handwritten digits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageClassification

from mctf_hf.cost import multiply_accumulates
from mctf_hf.hub import load_image_processor
from mctf_hf.images import ImageReader

from .fitting import finetuning
from .measuring import images_per_second
from .options import parser_of, read

DATASET = "data/digits"
CONFIGS = {"base": "configs/digits_base.yaml", "finetuned": "configs/digits.yaml"}


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`demo`."""
    read(parser_of("demo", demo), args)
    demo()


def demo() -> None:
    """Train a small ViT on digits, fuse its tokens, finetune it with MCTF and compare the three.

    Run it in a checkout of the repository. It saves the models in outputs/.
    """
    for file in (*CONFIGS.values(), DATASET):
        if not Path(file).exists():
            raise FileNotFoundError(
                f"{file} is not here: run the demo in a checkout of the repository"
            )
    console = Console()
    console.rule("1. Train a small ViT without fusion")
    finetuning(["fit", "--config", CONFIGS["base"]])
    console.rule("2. Finetune it with token fusion")
    finetuning(["fit", "--config", CONFIGS["finetuned"]])

    console.rule("3. Compare")
    folders = {
        name: yaml.safe_load(Path(config).read_text())["export"]["folder"]
        for name, config in CONFIGS.items()
    }
    base = AutoModelForImageClassification.from_pretrained(folders["base"])
    finetuned = AutoModelForImageClassification.from_pretrained(folders["finetuned"])
    untrained = AutoModelForImageClassification.from_pretrained(
        folders["base"], **finetuned.config.fusion_settings()
    )
    models = {
        "base": base.eval(),
        "fused, not finetuned": untrained.eval(),
        "fused and finetuned": finetuned.eval(),
    }
    images = load_dataset(DATASET, split="test")
    pixel_values = ImageReader(load_image_processor(folders["base"])).batch(images["image"])
    labels = torch.tensor(images["label"][:])
    with torch.inference_mode():
        runs = [lambda model=model: model(pixel_values[:64]) for model in models.values()]
        speeds = images_per_second(runs, 64)

    threads = torch.get_num_threads()
    table = Table(title=f"{len(labels)} test images; speed in batches of 64, {threads} threads")
    for heading in ("model", "accuracy", "GMACs", "images/s", "ratio to base"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    base_cost = multiply_accumulates(base.config)
    for (name, model), speed in zip(models.items(), speeds, strict=True):
        cost = multiply_accumulates(model.config)
        table.add_row(
            name,
            f"{100 * accuracy(model, pixel_values, labels):.1f}%",
            f"{cost / 1e9:.4f} ({100 * (cost / base_cost - 1):+.0f}%)",
            f"{speed:,.0f}",
            f"{speed / speeds[0]:.2f}x",
        )
    console.print(table)
    console.print(
        f"\nThe finetuned model lies in {folders['finetuned']}. Load it anywhere with\n\n"
        "  from transformers import AutoModelForImageClassification\n"
        "  model = AutoModelForImageClassification.from_pretrained(\n"
        f'      "{folders["finetuned"]}", trust_remote_code=True)\n',
        highlight=False,
    )


@torch.inference_mode()
def accuracy(model: Any, pixel_values: Tensor, labels: Tensor) -> float:
    """Fraction of images that are classified correctly."""
    predicted = torch.cat([model(batch).logits.argmax(-1) for batch in pixel_values.split(100)])
    return (predicted == labels).float().mean().item()
