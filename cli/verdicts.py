"""Judges fusion settings on real images; shows the verdicts as tables and pictures."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.opening import NamedDataset
from mctf_hf.candidates import METHODS, methods_for
from mctf_hf.files import write_csv
from mctf_hf.images import ImageReader
from mctf_hf.judging import Judge, Verdict, applied
from mctf_hf.problems import SINGLE, problem_type

from .evaluation import open_labelled
from .measuring import images_per_second
from .paths import open_images


def open_judge(
    model: Any, processor: Any, images: str, count: int | None, *, labels: bool, split: str | None
) -> Judge:
    """Create a judge with evenly spaced images of a folder or dataset.

    Args:
        count: number of images; ``None`` for all.
        labels: whether to judge a classifier by the labels of the images.
        split: split of the dataset; ``None`` as in :func:`.open_images`, or ``test`` with labels.

    Raises:
        ValueError: for a head for several labels per image or for regression, too few images, or
            labels that are missing or do not match the model's.
        OSError: if the source does not exist.
    """
    problem = problem_type(model.config)
    if problem != SINGLE and hasattr(model, "classifier"):
        raise ValueError(
            f"{type(model).__name__} with problem_type={problem} is not judged: only models with "
            "one label per image are, and encoders"
        )
    if labels:
        dataset = NamedDataset(images)
        labelled = open_labelled(dataset, split or "test", count, model, processor)
        batches = list(DataLoader(labelled, batch_size=64))
        pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
        return Judge(model, pixel_values, torch.cat([batch["labels"] for batch in batches]))
    pictures = list(open_images(images, count, exactly=False, split=split).values())
    if len(pictures) < 2:
        raise ValueError(f"{images} has {len(pictures)} images: at least 2 are needed")
    reader = ImageReader(processor, model.config.num_channels)
    return Judge(model, reader.batch(pictures))


def methods_of(words: str | None, model: Any) -> tuple[str, ...]:
    """The methods in a text such as ``tome,mctf``; for ``None``, all that suit the model.

    Raises:
        ValueError: for an unknown method, or one that does not suit the model.
    """
    known = methods_for(model)
    names = known if words is None else tuple(name.strip() for name in words.split(","))
    for name in names:
        if name not in known:
            unfit = " (it drops tokens, which this model restores)" if name in METHODS else ""
            raise ValueError(
                f"methods={words!r} is not allowed: {name!r} is none of {', '.join(known)}{unfit}"
            )
    return tuple(dict.fromkeys(names))


@torch.inference_mode()
def measure_speed(
    judging: Judge, verdicts: Sequence[Verdict], *, batch_size: int, rounds: int
) -> None:
    """Measure the speed of each verdict's setting relative to no fusion, and set its ``ratio``.

    All are timed in turns. The model without fusion computes all tokens, as in transformers.
    """
    pixel_values = judging.pixel_values[:batch_size]
    pixel_values = pixel_values.repeat(math.ceil(batch_size / len(pixel_values)), 1, 1, 1)
    pixel_values = pixel_values[:batch_size]

    def run(settings: dict[str, Any]) -> Tensor:
        with applied(judging.model, settings):
            return judging.model(pixel_values)

    nothing: dict[str, Any] = {"reduction": "none"}
    every = [{**nothing, "skip_unread": False}]
    every += [nothing if v.setting is None else v.setting.settings for v in verdicts]
    speeds = images_per_second(
        [partial(run, settings) for settings in every], batch_size, rounds=rounds
    )
    for verdict, speed in zip(verdicts, speeds[1:], strict=True):
        verdict.ratio = speed / speeds[0]


def table_of(verdicts: Sequence[Verdict], title: str, best: Verdict | None = None) -> Table:
    """Verdicts as a table; with ``best``, also how much more each loses than ``best``."""
    rows = [verdict.row(best) for verdict in verdicts]
    table = Table(title=title)
    shown = [name for name in _HEADINGS if name in rows[0]]
    for name in shown:
        justify: Any = "left" if name == "setting" else "right"
        table.add_column(_HEADINGS[name], justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*[_cell(row, name) for name in shown])
    return table


_HEADINGS = {
    "setting": "setting",
    "gmacs": "GMACs",
    "fraction": "of cost",
    "loss": "loss",
    "more_loss": "more than the best",
    "change": "change",
    "agreement": "agreement %",
    "accuracy": "accuracy %",
    "difference": "to unfused",
    "speed": "speed",
}
_FORMATS = {"gmacs": ".4g", "fraction": ".3f"}
_FORMATS |= dict.fromkeys(("loss", "more_loss", "change"), ".5f")


def _cell(row: dict[str, Any], name: str) -> str:
    """Text of a value of a verdict, with its standard error if it has one."""
    if name == "setting":
        return row[name]
    form = _FORMATS.get(name, ".2f")
    text = f"{row[name]:{form}}" + ("x" if name == "speed" else "")
    return f"{text} ± {row[f'{name}_error']:{form}}" if f"{name}_error" in row else text


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same columns as the text of a CSV file."""
    text = io.StringIO(newline="")
    write_csv(text, list(rows[0]), rows)
    return text.getvalue()


def draw(curves: Mapping[str, Sequence[Verdict]], title: str) -> bytes:
    """Plot accuracy or agreement against cost and, if it was measured, against speed.

    Args:
        curves: verdicts of each method, at several budgets.

    Returns:
        The content of a PNG file.
    """
    verdicts = [verdict for curve in curves.values() for verdict in curve]
    by_speed = all(verdict.ratio is not None for verdict in verdicts)
    figure = Figure(figsize=(6 * (1 + by_speed), 5), layout="constrained")
    accurate = all(verdict.right is not None for verdict in verdicts)
    value = "accuracy" if accurate else "agreement"
    read = "accuracy" if accurate else "agreement with the model without fusion"
    for number, axes in enumerate(figure.subplots(1, 1 + by_speed, squeeze=False)[0]):
        place = "speed" if number else "gmacs"
        for name, curve in curves.items():
            rows = sorted((verdict.row() for verdict in curve), key=lambda row: row[place])
            axes.errorbar(
                [row[place] for row in rows],
                [row[value] for row in rows],
                yerr=[row[f"{value}_error"] for row in rows],
                marker="o",
                capsize=2,
                label=name,
            )
        axes.set_xlabel("speed relative to no fusion" if number else "GMACs per image")
        axes.set_ylabel(f"{read}, %")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()
