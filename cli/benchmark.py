"""``mctf benchmark``: cost, speed, memory and accuracy of models, measured side by side."""

import json
import re
import statistics
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from lightning_modules.labelled_images import LabelledImages
from lightning_modules.opening import NamedDataset
from lightning_modules.processors import fit_shape, output_size
from mctf_hf.checks import check_range, check_scores
from mctf_hf.files import replace, write_text
from mctf_hf.hub import load_image_processor
from mctf_hf.images import ImageReader
from mctf_hf.problems import QUALITIES, Quality, quality

from .contestants import Contestant, make
from .evaluation import open_labelled
from .measuring import machine_name, peak_bytes, seconds_in_rounds
from .models import captions_of
from .options import parser_of, read, refuse
from .paths import check_output, open_images

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIGURES = 73  # terminal columns that the table needs besides the model names
MARKERS = "osD^vPX*"  # each marker is used for ten models, one per colour
Row = dict[str, Any]


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`benchmark`."""
    models = {
        "nargs": "+",
        "help": "NAME[,setting=value…]: a preset (deit_s, t2t_vit_14, lv_vit_s, …), a folder or a "
        "Hub id. Without any setting of fusion a plain ViT is the model of transformers. Settings "
        "are those of fusion (r=16, r=auto:0.56, reduction=tome, keep_rate=0.7, …), "
        "attn_implementation, compile (give one batch size, for a second one recompiles for any), "
        "aot to compile it ahead of time for any, slice=16 to feed it 16 images at a time, and "
        "sliced for the plain model with as many tokens cut off as others are fused.",
    }
    parser = parser_of("benchmark", benchmark, models=models)
    settings, given = read(parser, args)
    if settings["accuracy"] is None:
        refuse(given, {"split", "max_images"}, "without --accuracy, to which it belongs")
    threads = torch.get_num_threads()
    try:
        benchmark(**settings)
    finally:
        torch.set_num_threads(threads)


def benchmark(
    models: list[str],
    batch_sizes: str = "1,16",
    image_size: int | None = None,
    images: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 20,
    accuracy: str | None = None,
    split: str = "test",
    max_images: int | None = None,
    output: str | None = None,
    plot: str | None = None,
) -> None:
    """Time models in turns and compare each of them with the first.

    Args:
        models: the models, as :func:`main` describes them.
        batch_sizes: numbers of images per call, such as 1,16; each gets its own table.
        image_size: height and width in pixels. If unset, those of the first model.
        images: image file, folder of images, dataset folder or dataset id on the Hub; evenly
            spaced images are used. If unset, random numbers.
        dtype: number type of the models: float32, bfloat16 or float16.
        device: cpu, or cuda for the current GPU.
        threads: number of CPU threads. If unset, PyTorch chooses it.
        rounds: number of timings of each model; the median is used.
        accuracy: dataset folder or dataset id on the Hub to measure top-1 accuracy on. For several
            labels per image, it is the share of images with all labels right; for regression, the
            mean absolute error.
        split: split of that dataset.
        max_images: number of evenly spaced images of that split to use. If unset, all.
        output: JSON file to write.
        plot: PNG file to draw.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        allowed = "cpu or cuda" if torch.cuda.is_available() else "cpu (there is no GPU here)"
        raise ValueError(f"device={device!r} is not allowed: it must be {allowed}")
    check_range(1, rounds=rounds, threads=threads, image_size=image_size, max_images=max_images)
    batches = _counts(batch_sizes)
    for file, suffix in ((output, ".json"), (plot, ".png")):
        if file is not None:
            check_output(file, suffix)
    if threads is not None:
        torch.set_num_threads(threads)
    contestants: list[Contestant] = []
    for words in models:
        contestants.append(make(words, image_size, DTYPES[dtype], device))
        image_size = contestants[0].image_size
        slice_size = contestants[-1].model.slice_size
        if slice_size is not None and slice_size >= max(batches):
            raise ValueError(
                f"slice={slice_size!r} of {words!r} has no effect on batches of at most "
                f"{max(batches)} images"
            )
    top1: list[float | None] = [None] * len(contestants)
    labelled: list[LabelledImages] = []
    if accuracy is not None:
        labelled = [_labelled(one, accuracy, split, max_images) for one in contestants]
        judged = _judged(contestants)
    pixels = _pixel_values(images, max(batches), contestants[0].image_size)
    pixels = pixels.to(device, DTYPES[dtype])

    console = Console()
    shown, meant = _short(captions_of(models), console.width - FIGURES)
    for line in meant:
        console.print(line, soft_wrap=True, highlight=False)
    environment = _environment(device, dtype, pixels.shape[-1], images, rounds)
    rows: list[Row] = []
    measured_by_batch = [
        compare(contestants, pixels[:batch], rounds=rounds, device=device) for batch in batches
    ]
    if labelled:
        top1 = _accuracies(contestants, labelled, device, DTYPES[dtype])
        environment |= {
            "accuracy": accuracy,
            "metric": judged.name,
            "split": split,
            "num_images": len(labelled[0]),
        }
    for batch, measured in zip(batches, measured_by_batch, strict=True):
        for row, fraction in zip(measured, top1, strict=True):
            row["accuracy"] = fraction
        console.print(_table(measured, shown, batch, environment))
        rows += measured
    if output is not None:
        text = json.dumps({"environment": environment, "results": rows}, indent=2, allow_nan=False)
        write_text(output, text + "\n")
    if plot is not None:
        figure = _plot(rows, captions_of(models), environment)
        replace(plot, lambda draft: figure.savefig(draft, dpi=120, format="png"))


@torch.inference_mode()
def compare(
    contestants: Sequence[Contestant], pixel_values: Tensor, *, rounds: int, device: str = "cpu"
) -> list[Row]:
    """Measure all contestants on the same images, (b, channels, height, width).

    Returns:
        A row for each: GMACs of one image, images per second, latency of a batch in milliseconds
        (median and 95th percentile), peak memory in MiB without the weights, ratio of the speed to
        the first contestant's, and efficiency: this ratio divided by (first GMACs / own GMACs).
    """
    runs = [lambda model=c.model: model(pixel_values) for c in contestants]
    for run in runs:
        run()  # the first call compiles models with the setting `compile`
    memory = [peak_bytes(run, device=device) for run in runs]
    seconds = seconds_in_rounds(runs, rounds=rounds, device=device)
    rows: list[Row] = []
    for contestant, times, peak in zip(contestants, seconds, memory, strict=True):
        median = statistics.median(times)
        first = rows[0] if rows else None
        gmacs = contestant.multiply_accumulates / 1e9
        ratio = 1.0 if first is None else first["latency_p50_ms"] / (1000 * median)
        rows.append(
            {
                "model": contestant.name,
                "batch_size": len(pixel_values),
                "gmacs": gmacs,
                "images_per_second": len(pixel_values) / median,
                "latency_p50_ms": 1000 * median,
                "latency_p95_ms": 1000 * float(np.percentile(times, 95, method="nearest")),
                "peak_memory_mib": peak / 2**20,
                "ratio": ratio,
                "efficiency": 1.0 if first is None else ratio / (first["gmacs"] / gmacs),
            }
        )
    return rows


def _labelled(
    contestant: Contestant, dataset: str, split: str, max_images: int | None
) -> LabelledImages:
    """Open a dataset with the image processor of a contestant."""
    if contestant.folder is None or contestant.missing:
        raise ValueError(
            f"accuracy={dataset!r} is not allowed with {contestant.name}: its weights are random"
            + (f" ({', '.join(contestant.missing)})" if contestant.missing else "")
        )
    processor = load_image_processor(contestant.folder)
    fit_shape(processor)
    if output_size(processor) != (contestant.image_size,) * 2:
        raise ValueError(
            f"accuracy={dataset!r} is not allowed with images of {contestant.image_size} pixels: "
            f"the image processor of {contestant.folder} makes others"
        )
    model = contestant.model.model
    return open_labelled(NamedDataset(dataset), split, max_images, model, processor)


@torch.inference_mode()
def _accuracies(
    contestants: Sequence[Contestant],
    labelled: Sequence[LabelledImages],
    device: str,
    dtype: torch.dtype,
) -> list[float | None]:
    """Mean :class:`.Quality` of each contestant over the images."""
    judged = _judged(contestants)
    sums = torch.zeros(len(contestants), dtype=torch.float64)
    groups: dict[tuple[str, str], list[int]] = {}  # models with the same pixels and labels
    for i, images in enumerate(labelled):
        key = images.reader.processor.to_json_string(), str(images.label_names)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        images = labelled[members[0]]
        for batch in DataLoader(images, batch_size=64, num_workers=2):
            pixels = batch["pixel_values"].to(device, dtype)
            for i in members:
                scores = contestants[i].model(pixels)
                found = check_scores(scores, contestants[i].name).float().cpu()
                sums[i] += judged.of(found, batch["labels"]).sum()
    return [float(one) / len(labelled[0]) for one in sums]


def _judged(contestants: Sequence[Contestant]) -> Quality:
    """The quality measure of the models.

    Raises:
        ValueError: if it is not the same for all models.
    """
    by_name = {one.name: quality(one.model.model.config) for one in contestants}
    if len({judged.name for judged in by_name.values()}) > 1:
        qualities = ", ".join(f"{judged.long_title} of {name}" for name, judged in by_name.items())
        raise ValueError(f"accuracy is not allowed with models of different problems: {qualities}")
    return next(iter(by_name.values()))


def _counts(text: str) -> list[int]:
    """Parse numbers such as ``1,16``, ``1 16`` or ``[1, 16]``."""
    words = re.split(r"[\s,]+", text.strip("[] "))
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(
            f"batch_sizes={text!r} is not allowed: it must be counts such as 1,16, from 1 on"
        )
    return list(dict.fromkeys(map(int, words)))


def _pixel_values(images: str | None, count: int, size: int) -> Tensor:
    if images is None:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    return ImageReader(processor).batch(open_images(images, count).values())


def _environment(
    device: str, dtype: str, size: int, images: str | None, rounds: int
) -> dict[str, Any]:
    return {
        "device": machine_name(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "image_size": size,
        "images": images or "random",
        "rounds": rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _short(names: Sequence[str], room: int) -> tuple[list[str], list[str]]:
    """The names and no lines; if a name exceeds ``room``, numbers and lines that explain them."""
    if max(map(len, names)) <= max(room, len("model")):
        return list(names), []
    keys = [str(number) for number in range(1, len(names) + 1)]
    return keys, [f"{key}: {name}" for key, name in zip(keys, names, strict=True)]


def _table(rows: list[Row], names: Sequence[str], batch: int, environment: dict[str, Any]) -> Table:
    where = f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}"
    table = Table(title=f"batches of {batch}, {environment['image_size']} px; {where}")
    table.add_column("model", overflow="fold")
    judged = QUALITIES[environment.get("metric", "accuracy")]
    headings = ["GMACs", "images/s", "p50 ms", "p95 ms", "peak MiB", "ratio", "efficiency"]
    for heading in (*headings, *([judged.title] if "metric" in environment else [])):
        table.add_column(heading, justify="right")
    for row, name in zip(rows, names, strict=True):
        table.add_row(
            name,
            f"{row['gmacs']:.3f}",
            f"{row['images_per_second']:,.1f}",
            f"{row['latency_p50_ms']:,.1f}",
            f"{row['latency_p95_ms']:,.1f}",
            f"{row['peak_memory_mib']:,.1f}",
            f"{row['ratio']:.2f}x",
            f"{row['efficiency']:.2f}",
            *([] if row["accuracy"] is None else [judged.text(row["accuracy"])]),
        )
    return table


def _plot(rows: list[Row], names: Sequence[str], environment: dict[str, Any]) -> Figure:
    """Plot speed against cost, with one panel per batch size.

    The dashed line is the speed that the GMACs predict. The legend is below the panels.
    """
    batches = sorted({row["batch_size"] for row in rows})
    width = max(5 * len(batches), 7)
    legend = [fill(name, 11 * width) for name in names]
    lines = 1 + sum(name.count("\n") + 1 for name in legend)
    figure = Figure(figsize=(width, 4 + 0.2 * lines), layout="constrained")
    for axes, batch in zip(
        figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True
    ):
        measured = [row for row in rows if row["batch_size"] == batch]
        first = measured[0]
        costs = sorted(row["gmacs"] for row in measured)
        ideal = [first["images_per_second"] * first["gmacs"] / cost for cost in costs]
        axes.plot(costs, ideal, color="0.7", linestyle="--", label="what the GMACs promise")
        for number, (row, name) in enumerate(zip(measured, legend, strict=True)):
            marker = MARKERS[number // 10 % len(MARKERS)]
            axes.scatter(row["gmacs"], row["images_per_second"], label=name, marker=marker)
        axes.set_xlabel("GMACs per image")
        axes.set_ylabel("images per second")
        axes.set_ylim(bottom=0)
        axes.set_title(f"batches of {batch}, {environment['dtype']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize="small")
    return figure
