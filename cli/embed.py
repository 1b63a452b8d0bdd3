"""``mctf embed``: turns image collections of any size into vectors, on any number of devices."""

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from rich.console import Console
from rich.table import Table

from lightning_modules.comparing import Comparison, compare_settings
from lightning_modules.embedding_run import (
    Embedding,
    EmbeddingRun,
    Pace,
    ToldToStop,
    embed_by_lightning,
)
from lightning_modules.image_sources import open_source
from lightning_modules.vector_folder import UNREADABLE, VectorFolder, row_features
from mctf_hf.checks import check_range
from mctf_hf.embedding import Embedder, digest
from mctf_hf.images import MODES, ImageReader, OnBadImage
from mctf_hf.texts import TextEncoder, Texts

from .models import load_encoder, parse
from .options import parser_of, read, refuse

# How long processes that are done wait for the last one.
PATIENCE = timedelta(days=7)
PACKAGES = ("mctf-hf", "torch", "transformers", "datasets", "pyarrow", "pillow", "lightning")
SOURCE = ("images", "split", "name", "revision", "streaming", "image_column")


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`embed`."""
    model = {
        "help": "NAME[,setting=value…]: a folder or Hub id, with settings of fusion (r=16, "
        "r=auto:0.6, reduction=tome, …).",
    }
    parser = parser_of("embed", embed, {"source", "trainer"}, model=model)
    ours: set[str | int] = {"columns", "unit_size"}
    parser.add_function_arguments(open_source, skip=ours)
    parser.add_function_arguments(make_trainer, "trainer", skip={"callbacks"})
    settings, given = read(parser, args)
    if settings["compare"] is None:
        refuse(given, {"sample"}, "without --compare")
    if settings["engine"] == "ray":
        refuse(given, {"trainer"}, "with --engine ray, which places processes itself")
    else:
        refuse(given, {"actors", "ray_address"}, "without --engine ray")
    source = {name: settings.pop(name) for name in SOURCE}
    embed(**settings, source=source)


def make_trainer(
    callbacks: list[Callback],
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] = "32-true",
) -> L.Trainer:
    """Create a trainer for prediction in one or more processes.

    Args:
        callbacks: callbacks of the trainer.
        accelerator: accelerator of Lightning: cpu, gpu, auto or another one.
        devices: number of devices to use on each machine, or a list of device indices.
        num_nodes: number of machines; all of them must have access to the output folder.
        strategy: strategy of Lightning; ddp for several processes.
        precision: numeric precision of the model.
    """
    settings: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": num_nodes,
        "precision": precision,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    try:
        trainer = L.Trainer(strategy=strategy, **settings)
    except TypeError as error:
        raise ValueError(f"trainer.devices={devices!r} is not allowed: {error}") from error
    if strategy == "auto" and isinstance(trainer.strategy, DDPStrategy):
        trainer = L.Trainer(strategy=DDPStrategy(timeout=PATIENCE), **settings)
    return trainer


def embed(
    model: str,
    source: dict[str, Any],
    output: str,
    columns: str | None = None,
    vector: Literal["class_token", "pooled", "mean_patches"] | None = None,
    normalize: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    texts: str | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    shard_size: int = 1000,
    on_bad_image: OnBadImage = "error",
    compare: str | None = None,
    sample: int = 500,
    engine: Literal["lightning", "ray"] = "lightning",
    actors: int = 1,
    ray_address: str | None = None,
    trainer: dict[str, Any] | None = None,
) -> None:
    """Turn a collection of images into vectors: a folder of parquet shards and a manifest.

    If a run was interrupted, run the same command again to embed the remaining images.

    Args:
        model: the model, as :func:`main` describes it.
        source: arguments of :func:`.open_source`.
        output: folder to write, local or mounted.
        columns: columns to copy to the output, such as label,key; in tar files, file name endings.
        vector: the class token, the model's pooled output (the embedding of CLIP and SigLIP, the
            input of a classifier's head), or the mean of the patches. If unset, the class token;
            for models with an image embedding or without a class token, the pooled output.
        normalize: scale vectors to length 1.
        dtype: number type of the vectors.
        texts: file of labels for CLIP and SigLIP, one per line; each image gets a score per label.
        batch_size: number of images per model call, in each process.
        num_workers: number of processes that decode images, per process that embeds them.
        shard_size: number of images per shard; a tar file or a shard of a stream stays one shard.
        on_bad_image: ``error`` stops at an image that cannot be read, ``skip`` lists it in
            unreadable.csv.
        compare: fusion settings to compare with afterwards, such as r=0.
        sample: number of images to compare.
        engine: lightning for this machine, or for several machines that start the command together;
            ray for a Ray cluster.
        actors: number of Ray processes that embed; each has a GPU if the cluster has any.
        ray_address: address of a Ray cluster. If unset, a running one or a new one on this machine.
        trainer: arguments of :func:`make_trainer`.
    """
    check_range(0, num_workers=num_workers)
    check_range(1, batch_size=batch_size, shard_size=shard_size, actors=actors)
    check_range(2, sample=sample)
    other = None if compare is None else f"{parse(model)[0]},{compare}"
    if other is not None:
        parse(other)  # raises errors before the work
    console, options = Console(), trainer or {}
    run = _open(
        model, source, output,
        columns=[] if columns is None else [column.strip() for column in columns.split(",")],
        vector=vector, normalize=normalize, dtype=dtype, texts=texts, batch_size=batch_size,
        shard_size=shard_size, precision=options.get("precision", "32-true"),
        num_workers=num_workers, on_bad_image=on_bad_image,
    )  # fmt: skip
    earlier, device = run.folder.check(run.settings), torch.device("cpu")
    if earlier is not None and earlier["status"] == "finished":
        print(f"{output} was finished before: nothing is left to do")
        print(_result_text(earlier, output))
    elif engine == "ray":
        from lightning_modules.on_ray import embed_by_ray

        print(_result_text(embed_by_ray(run, actors, ray_address, console), output))
    else:
        _warn_of_other_versions(earlier, run.record)
        made = _by_lightning(run, options, console)
        if not made.is_first:
            return
        device = made.device
        print(_result_text(made.manifest, output), _pace_text(made.pace), sep="\n")
    if other is not None:
        beside = Embedder(load_encoder(other)[0], run.embedder.vector).eval().to(device)
        found = compare_settings(run, beside, sample)
        run.folder.add_to_manifest({"comparison": {"with": other, **asdict(found)}})
        console.print(_table(found, model, other))


def _open(
    model: str,
    source: dict[str, Any],
    output: str,
    *,
    columns: list[str],
    vector: str | None,
    normalize: bool,
    dtype: str,
    texts: str | None,
    batch_size: int,
    shard_size: int,
    precision: str,
    num_workers: int,
    on_bad_image: OnBadImage,
) -> EmbeddingRun:
    """Open the model, images and folder of a run; collect all settings that affect its output."""
    folder = VectorFolder(output)
    labels = None if texts is None else Texts(_lines(texts), TextEncoder(parse(model)[0]))
    loaded, processor = load_encoder(model)
    embedder = Embedder(loaded, vector, normalize=normalize, texts=labels).eval()
    reader = ImageReader(processor, loaded.config.num_channels)
    collection = open_source(**source, columns=columns, unit_size=shard_size)
    features = row_features(
        collection.features,
        _width(embedder, reader),
        dtype,
        embedder.labels,
        names_best=embedder.names_best,
        all_scores=texts is not None or not embedder.names_best,
    )
    settings = {
        "model": model,
        "weights": digest(loaded),
        "fusion": loaded.config.fusion_settings(),
        "image_processor": _plain(processor),
        "vector": embedder.vector,
        "normalize": normalize,
        "dtype": dtype,
        "precision": precision,
        "texts": None if labels is None else list(labels.texts),
        "columns": columns,
        "collection": collection.digest(),
        "shard_size": shard_size,
        "batch_size": batch_size,
    }
    record = {
        "source": source,
        "kind": collection.kind,
        "revision": getattr(loaded.config, "_commit_hash", None),
        "width": features["vector"].length,
        "labels": embedder.labels if "scores" in features else None,
        "versions": {name: version(name) for name in PACKAGES},
    }
    return EmbeddingRun(
        collection, embedder, reader, folder, features, settings, record, batch_size, num_workers,
        on_bad_image,
    )  # fmt: skip


def _by_lightning(run: EmbeddingRun, options: dict[str, Any], console: Console) -> Embedding:
    """Embed the remaining images. After SIGTERM, print how to continue, and exit."""
    try:
        return embed_by_lightning(run, lambda calls: make_trainer(calls, **options), console)
    except ToldToStop:
        there = f"{len(run.folder.done()):,} of {run.source.num_units:,} shards are there"
        print(
            f"mctf: told to stop (SIGTERM): {there}, the same command goes on from them",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGTERM)  # the exit status after a signal


def _lines(file: str) -> list[str]:
    """The non-empty lines of a text file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"texts={file!r}: there is no such file")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"texts={file!r} is not allowed: it is no text in UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"texts={file!r} is not allowed: it has no line with a text")
    return lines


def _width(embedder: Embedder, reader: ImageReader) -> int:
    """Number of channels of the vectors, measured with a black image."""
    black = reader(Image.new(MODES[reader.channels], (64, 64)))
    return embedder(black[None]).vectors.shape[1]


def _plain(processor: Any) -> dict[str, Any]:
    """Settings of an image processor that affect its output."""
    return {
        name: value
        for name, value in processor.to_dict().items()
        if value is not None and name[0] != "_"
    }


def _warn_of_other_versions(earlier: dict[str, Any] | None, record: Mapping[str, Any]) -> None:
    """Print a warning if other package versions wrote the existing shards."""
    before = record["versions"] if earlier is None else earlier["versions"]
    other = [f"{name} {before[name]}" for name, now in record["versions"].items()
             if name in before and before[name] != now]  # fmt: skip
    if other:
        by = ", ".join(other)
        print(f"The existing shards were written by {by}: new ones may differ by rounding")


def _result_text(manifest: Mapping[str, Any], output: str) -> str:
    """Text about the result of a run."""
    counts = manifest["counts"]
    text = f"{counts['vectors']:,} vectors in {counts['shards']:,} shards: {output}"
    if counts["unreadable"]:
        text += f"\n{counts['unreadable']:,} images can't be read: {output}/{UNREADABLE}"
    return text


def _pace_text(pace: Pace) -> str:
    if not pace.speed:
        return "too few batches to measure the speed"
    waited = 100 * (pace.share_waited or 0)
    return (
        f"{pace.speed:,.1f} images/s in this process; the model waited for images {waited:.1f}% "
        "of the time"
    )


def _table(found: Comparison, model: str, other: str) -> Table:
    table = Table(title=f"{model} beside {other}, {found.images} images")
    table.add_column("what")
    table.add_column("", justify="right")
    table.add_row("cosine, mean", f"{found.cosine:.4f}")
    table.add_row("cosine, lowest 1%", f"{found.cosine_low:.4f}")
    table.add_row(f"of the {found.neighbours} nearest stay", f"{100 * found.kept:.1f}%")
    return table
