"""Files in and out: images of any source, and where results may go."""

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image

from lightning_modules.columns import find_image_column
from lightning_modules.opening import NamedDataset
from mctf_hf.images import decode


def check_output(file: str, *suffixes: str) -> Path:
    """The path of a file to be written, if its name and folder are right.

    Raises:
        ValueError: if its name ends otherwise.
        OSError: if its folder does not exist or takes no files, or it is a folder itself.
    """
    path = Path(file)
    if path.suffix not in suffixes:
        raise ValueError(f"{file} is not allowed: the file's name ends in {' or '.join(suffixes)}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{file} cannot be written: its folder does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{file} cannot be written: it is a folder")
    try:
        with TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror} in its folder") from error
    return path


def open_images(
    source: str, count: int | None = None, *, exactly: bool = True, split: str | None = None
) -> dict[str, Image.Image]:
    """Images in RGB by their names, evenly spaced ones where there are more: folders are sorted.

    Args:
        source: an image file, a folder of images or of parquet files, or a dataset's id on the
            Hub.
        count: how many; unset, all of them.
        exactly: whether fewer will not do.
        split: of the dataset; unset, its test, validation or only one.

    Returns:
        In their order, each under its file's name or its row.

    Raises:
        ValueError: if there is no column of images or more than one, fewer images than asked for,
            or one that can't be read.
        OSError: for a source that does not exist.
    """
    if not source:
        raise ValueError(
            "images='' is not allowed: name an image, a folder of images or of a dataset, or a "
            "dataset of the Hub"
        )
    if os.path.isfile(source):
        images = {source: decode(source, source)}
    else:
        dataset = NamedDataset(source)
        if split is None:
            preferred = [name for name in ("test", "validation") if name in dataset.splits]
            split = (preferred or dataset.splits)[0]
        rows = dataset.load(split)
        column = find_image_column(rows, source)
        stored = rows.cast_column(column, ImageFeature(decode=False))
        images = {}
        for i in evenly_spaced(len(rows), count):
            row = f"row {i} of {source}, split {split}"
            file = _file(stored[i][column])
            name = row if file is None or file in images else file
            images[name] = decode(stored[i][column], row)
    if exactly and count is not None and len(images) < count:
        raise ValueError(f"{source} has {len(images)} images, not the {count} that are needed")
    if not images:
        raise ValueError(f"{source} has no images")
    return images


def evenly_spaced(total: int, count: int | None) -> list[int]:
    """So many of the numbers below a total, or all of them, from 0 on."""
    taken = min(total if count is None else count, total)
    return np.linspace(0, total, taken, endpoint=False).astype(int).tolist()


def _file(stored: dict[str, Any] | None) -> str | None:
    """Where an image lies that is not in the dataset itself."""
    return stored["path"] if stored is not None and stored["bytes"] is None else None
