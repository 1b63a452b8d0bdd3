"""Images from files, folders and datasets, and checks of output files."""

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
    """The path of an output file, after checks of its name and folder.

    Raises:
        ValueError: if its name does not end in one of ``suffixes``.
        OSError: if its folder does not exist or is not writable, or if it is a folder itself.
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
    """Open RGB images, evenly spaced ones if there are more than ``count``.

    Args:
        source: image file, folder of images or of parquet files, or dataset id on the Hub.
        count: number of images; ``None`` for all.
        exactly: whether fewer images are an error.
        split: split of the dataset; ``None`` for test, else validation, else the first one.

    Returns:
        The images in order, by file name or row.

    Raises:
        ValueError: if there is not exactly one column of images, if there are too few images, or if
            one can't be read.
        OSError: if the source does not exist.
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
    """``count`` evenly spaced numbers below ``total``, from 0 on; all if it is None or larger."""
    taken = min(total if count is None else count, total)
    return np.linspace(0, total, taken, endpoint=False).astype(int).tolist()


def _file(stored: dict[str, Any] | None) -> str | None:
    """Path of an image that is stored outside of the dataset; ``None`` for others."""
    return stored["path"] if stored is not None and stored["bytes"] is None else None
