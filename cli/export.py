"""``mctf export``: writes a model as ONNX or ``.pt2``, and checks the file against the model."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mctf_hf import MCTFViTForImageClassification
from mctf_hf import export as exporting
from mctf_hf.checks import check_range
from mctf_hf.export import TOLERANCE, Agreement
from mctf_hf.files import draft
from mctf_hf.images import ImageReader, usual_processor
from mctf_hf.presets import PRESETS, preset, preset_class
from mctf_hf.registry import only_if_asked

from .measuring import images_per_second, machine_name
from .models import load, parse, resolve
from .options import parser_of, read, refuse
from .paths import check_output, open_images

WRITE = {
    "onnx": exporting.to_onnx,
    "torch_export": exporting.to_torch_export,
    "aot_inductor": exporting.to_aot_inductor,
}
RUNTIME = {"onnx": "onnxruntime", "torch_export": "torch.export", "aot_inductor": "AOTInductor"}


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`export`."""
    model = {
        "help": "NAME[,setting=value…]: a folder, a Hub id, or a preset with random weights "
        "(deit_s, t2t_vit_14, lv_vit_s, …). Settings are those of fusion: r=16, reduction=tome, …",
    }
    parser = parser_of("export", export, model=model)
    settings, given = read(parser, args)
    if not settings["speed"]:
        refuse(given, {"rounds"}, "without --speed true, to which it belongs")
        if "batch_size" in given and settings["batch_size"] > settings["count"] - 3:
            raise ValueError(
                f"batch_size={settings['batch_size']!r} has no effect with "
                f"count={settings['count']!r}: 3 images go before a batch of that size"
            )
    export(**settings)


def export(
    model: str,
    output: str,
    aot_inductor: bool = False,
    images: str | None = None,
    count: int = 100,
    batch_size: int = 16,
    speed: bool = False,
    rounds: int = 10,
) -> None:
    """Write a model to a file that runs without this library.

    The file computes in float32. It is compared with torch before it is put in place.

    Args:
        model: the model, as :func:`main` describes it.
        output: file to write, model.onnx or model.pt2.
        aot_inductor: compile model.pt2 ahead of time, for this type of processor and this release
            of torch. It takes a minute, needs a C++ compiler, and is the fastest form on a CPU.
        images: images for the check: folder of images, dataset folder or dataset id on the Hub;
            evenly spaced images are used. If unset, random numbers.
        count: number of images for the check, in batches of several sizes.
        batch_size: the largest of these batch sizes.
        speed: measure the speed of single images and of batches of batch_size, with fusion and with
            r=0.
        rounds: number of timings of each; the median is used.
    """
    file = check_output(output, ".onnx", ".pt2")
    kind = "onnx" if file.suffix == ".onnx" else "torch_export"
    if aot_inductor and kind == "onnx":
        raise ValueError(
            f"aot_inductor=True is not allowed with output={output!r}: the file's name ends in .pt2"
        )
    kind = "aot_inductor" if aot_inductor else kind
    check_range(3, count=count)
    check_range(2, batch_size=batch_size)
    check_range(1, rounds=rounds)
    if kind == "onnx":
        exporting.import_onnx()
    made, processor = _load(model)
    pixel_values = _pixel_values(made, processor, images, max(count, batch_size if speed else 0))

    console = Console()
    with draft(file) as path:
        WRITE[kind](made, path, image_processor=processor)
        batches = [pixel_values[:1], pixel_values[1:3]]
        batches += pixel_values[3:count].split(batch_size) if count > 3 else []
        found = exporting.check(made, path, batches)
        rounding = exporting.check_rounding(made, batches) if found.differing else None
        console.print(_agreement(f"{file.name} in {RUNTIME[kind]}", images, found, rounding))
        _judge(file, found, rounding)
        if speed:
            for table in _speed(made, path, kind, pixel_values[:batch_size], rounds):
                console.print(table)
    console.print(f"{file}: {file.stat().st_size / 2**20:,.1f} MiB", highlight=False)


def _load(words: str) -> tuple[Any, Any]:
    """A model for inference, and its image processor; ``None`` for a preset."""
    name, settings = parse(words)
    if name not in PRESETS:
        model, processor = load(words)
        return model.float(), processor
    config = preset(name, **resolve(preset(name), only_if_asked(settings)))
    config.check_effect(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return preset_class(name)(config).eval(), None


def _pixel_values(
    model: MCTFViTForImageClassification, processor: Any, images: str | None, count: int
) -> Tensor:
    """Real or random images, (count, channels, height, width)."""
    height, width = model.config.usual_size
    shape = (model.config.num_channels, height, width)
    if images is None:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    if processor is None:
        processor = usual_processor(model.config)
    reader = ImageReader(processor, model.config.num_channels)
    pixel_values = reader.batch(open_images(images, count).values())
    if pixel_values.shape[1:] != shape:
        raise ValueError(
            f"the image processor makes {' x '.join(map(str, pixel_values.shape[1:]))} numbers of "
            f"an image, the model takes {' x '.join(map(str, shape))}"
        )
    return pixel_values


def _judge(file: Path, found: Agreement, rounding: Agreement | None) -> None:
    """Raise RuntimeError if the file differs from the model by more than rounding explains."""
    if not math.isfinite(found.max_difference):
        raise RuntimeError(f"{file} is not written: outputs are infinite or no numbers")
    if rounding is None:
        return
    count = sum(found.batch_sizes)
    differing, explained = found.differing * count, rounding.differing * count
    if differing > explained + 2 + count / 10:
        raise RuntimeError(
            f"{file} is not written: {differing:.0f} of {count} images differ by more than "
            f"{TOLERANCE:g}, up to {found.max_difference:.1e}, and rounding explains "
            f"{explained:.0f}"
        )


def _agreement(
    name: str, images: str | None, found: Agreement, rounding: Agreement | None
) -> Table:
    count = sum(found.batch_sizes)
    shown = f"{count} random images" if images is None else f"{count} images of {images}"
    sizes = ", ".join(map(str, sorted(set(found.batch_sizes))))
    table = Table(title=f"{shown} in batches of {sizes}")
    if rounding is not None:
        table.caption = "Where two tokens attract almost equally, rounding decides which one fuses"
    table.add_column("compared with torch", overflow="fold")
    top1 = [] if found.top1 is None else ["same top-1"]  # an encoder has none
    for heading in ("max difference", f"images > {TOLERANCE:g}", *top1):
        table.add_column(heading, justify="right")
    rows = {name: found, "torch in float64": rounding}
    for name, agreement in rows.items():
        if agreement is not None:
            table.add_row(
                name,
                f"{agreement.max_difference:.1e}",
                f"{100 * agreement.differing:.1f}%",
                *([] if agreement.top1 is None else [f"{100 * agreement.top1:.1f}%"]),
            )
    return table


@torch.inference_mode()
def _speed(
    model: MCTFViTForImageClassification, file: Path, kind: str, pixel_values: Tensor, rounds: int
) -> Iterator[Table]:
    """Yield tables of the speed of the file and the model, fused and with r=0, for both batches."""
    with tempfile.TemporaryDirectory(prefix="mctf-") as folder:
        base = WRITE[kind](model, Path(folder, f"base{file.suffix}"), r=0)
        fused_file, base_file = exporting.load(file), exporting.load(base)
    for batch in (pixel_values[:1], pixel_values):
        runs = [
            partial(base_file, batch),
            partial(fused_file, batch),
            partial(model, batch, r=0),
            partial(model, batch),
        ]
        speeds = images_per_second(runs, len(batch), rounds)
        table = Table(
            title=f"batches of {len(batch)}; {machine_name()}, {torch.get_num_threads()} threads"
        )
        for heading in ("", "r=0, images/s", "fused, images/s", "ratio"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, base_speed, speed in zip(
            (RUNTIME[kind], "torch"), speeds[::2], speeds[1::2], strict=True
        ):
            table.add_row(name, f"{base_speed:,.1f}", f"{speed:,.1f}", f"{speed / base_speed:.2f}x")
        yield table
