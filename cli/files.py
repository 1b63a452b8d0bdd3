"""Files in and out: images of any source, and where results may go."""

import os
from itertools import islice
from pathlib import Path

from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from mctf_hf.images import decode


def check_output(file: str, *suffixes: str) -> Path:
    """The path of a file to be written, if its name and folder are right.

    Raises:
        ValueError: if its name ends otherwise.
        FileNotFoundError: if its folder does not exist.
    """
    path = Path(file)
    if path.suffix not in suffixes:
        raise ValueError(f"{file} is not allowed: the file's name ends in {' or '.join(suffixes)}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{file} cannot be written: its folder does not exist")
    return path


def open_images(
    source: str, count: int | None = None, *, exactly: bool = True
) -> list[Image.Image]:
    """Images in RGB, in their order.

    Args:
        source: an image file, a folder of images or of parquet files, or a dataset's id on the
            Hub, whose test, validation or only split with a column ``image`` is read.
        count: how many; unset, all of them.
        exactly: whether fewer will not do.

    Raises:
        ValueError: if there is no column ``image``, or fewer images than asked for.
        OSError: for a file that holds no image, or a source that does not exist.
    """
    if os.path.isfile(source):
        images = [decode(source, source)]
    else:
        splits = load_dataset(source)
        preferred = [name for name in ("test", "validation") if name in splits]
        rows = splits[(preferred or list(splits))[0]]
        if "image" not in rows.column_names:
            raise ValueError(f"{source} has no column 'image', only {rows.column_names}")
        stored = rows.cast_column("image", ImageFeature(decode=False))["image"]
        images = [
            decode(one, f"row {i} of {source}") for i, one in enumerate(islice(stored, count))
        ]
    if exactly and count is not None and len(images) < count:
        raise ValueError(f"{source} has {len(images)} images, not the {count} that are needed")
    return images
