"""Folders of images: one subfolder per class, or splits that contain such subfolders.

``datasets`` guesses splits from words anywhere in a path and treats paths as patterns. Here, names
have only the meanings that :func:`open_image_folder` describes.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset
from datasets import Image as ImageFeature

from mctf_hf.images import is_image_name, needs_heif

from .ranks import warn_once

LABEL = "label"  # column of the class names
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".parquet", ".arrow")  # images beside such a file only illustrate the dataset's page


@dataclass
class Found:
    """Files found in a folder.

    Attributes:
        images: files with the extension of an image, in order.
        tables: files that ``datasets`` reads.
        left_out: number of unused files by reason.
    """

    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Text about the unused files; empty if there are none."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def find_images(folder: Path) -> Found:
    """Find images in a folder and its subfolders, sorted by path; links are followed.

    Files and folders whose names begin with a dot or two underscores are left out.
    """
    found = Found()
    found.images += walk_images(folder, found)
    return found


def walk_images(folder: Path, found: Found) -> Iterator[Path]:
    """Yield the images of :func:`find_images`, and add all other files to ``found``."""
    for path in _walk(folder, (), found):
        if needs_heif(path.name):
            found.left_out["HEIC (pip install 'mctf-hf[heic]' for them)"] += 1
        elif is_image_name(path.name):
            yield path
        elif path.suffix.lower() in TABLES and path.name not in METADATA:
            found.tables.append(path)
        elif path.name not in METADATA:
            found.left_out["that are no images by their names"] += 1
    found.left_out = +found.left_out


def _walk(folder: Path, above: tuple[tuple[int, int], ...], found: Found) -> Iterator[Path]:
    """Yield the regular files of a folder; ``above`` identifies the folders that contain it."""
    own = folder.stat()
    identity = (own.st_dev, own.st_ino)
    if identity in above:
        found.left_out["that are links to a folder around them"] += 1
        return
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.name.startswith((".", "__")):
            below = _walk(folder / entry.name, (*above, identity), Found())
            files = [Path(entry.name)] if not entry.is_dir() else below
            with suppress(OSError):  # of a hidden folder that nobody may read
                for file in files:
                    found.left_out["hidden"] += is_image_name(file.name)
        elif entry.is_dir():
            yield from _walk(folder / entry.name, (*above, identity), found)
        elif entry.is_file():
            yield folder / entry.name
        elif entry.is_symlink():
            found.left_out["that are links to nothing"] += 1
        else:
            found.left_out["that are no regular files"] += 1


def open_image_folder(folder: Path) -> dict[str, Dataset] | None:
    """Open the splits of a folder of images, by canonical name; None for another kind of folder.

    The subfolders are splits if all have names of splits (``train``, ``val``, ``validation``,
    ``test``, …) and one of them has subfolders with images or a metadata file. Otherwise the folder
    is one split, ``train``. The subfolders of a split are its classes, with all images below them.
    If a split contains ``metadata.csv``, ``.jsonl`` or ``.parquet``, the rows of this file define
    its images instead: by ``file_name``, with further columns.

    Returns:
        Rows with a column ``image`` and, if there are classes, ``label``: the class name.

    Raises:
        ValueError: if some subfolders look like splits and others like classes, or for an invalid
            metadata file.
    """
    found = find_images(folder)
    if found.tables or not found.images or _is_configured(folder):
        return None
    subfolders: dict[str, list[Path]] = {}
    for path in found.images:
        first, *below = path.relative_to(folder).parts
        if below:
            subfolders.setdefault(first, []).append(path)
    divided = [
        name
        for name, images in subfolders.items()
        if name.lower() in SPLITS and _is_divided(folder / name, images)
    ]
    if _metadata_file(folder) is not None:
        divided = []
    others = [name for name in subfolders if name.lower() not in SPLITS]
    if divided and others:
        raise ValueError(
            f"{folder} holds {', '.join(divided)} with subfolders, as splits have them, and "
            f"{', '.join(others)}: name all subfolders as splits or none"
        )
    if not divided:
        splits = {"train": _rows(folder, found.images, found.left_out)}
    else:
        names = [SPLITS[name.lower()] for name in subfolders]
        if len(set(names)) < len(names):
            raise ValueError(f"{folder} holds {', '.join(subfolders)}: two of them are one split")
        splits = {
            SPLITS[name.lower()]: _rows(folder / name, images, found.left_out)
            for name, images in subfolders.items()
        }
        outside = len(found.images) - sum(map(len, subfolders.values()))
        found.left_out["that are in no split"] += outside
    found.left_out = +found.left_out
    if found.left_out:
        warn_once(f"{folder}: files are left out: {found.summary()}")
    return splits


def _is_configured(folder: Path) -> bool:
    """Whether the folder has a dataset card that configures how to read its files."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(errors="replace")
    return text.startswith("---") and "\nconfigs:" in text.split("\n---")[0]


def _is_divided(folder: Path, images: Sequence[Path]) -> bool:
    """Whether a folder has subfolders with images, or a metadata file."""
    nested = any(path.parent != folder for path in images)
    return nested or _metadata_file(folder) is not None


def _metadata_file(folder: Path) -> Path | None:
    """The metadata file of a split, if it has one."""
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(present) > 1:
        raise ValueError(
            f"there are several metadata files, {', '.join(map(str, present))}: keep one"
        )
    return present[0] if present else None


def _rows(folder: Path, images: Sequence[Path], left_out: Counter[str]) -> Dataset:
    """The rows of one split."""
    metadata = _metadata_file(folder)
    usable = [path for path in images if _is_text(str(path))]
    left_out["whose names are not UTF-8"] += len(images) - len(usable)
    if metadata is not None:
        columns = _metadata(metadata, usable, left_out)
    else:
        classes = [path.relative_to(folder).parts[:-1] for path in usable]
        if any(classes):
            left_out["that are in no class folder"] += classes.count(())
            usable = [path for path, parts in zip(usable, classes, strict=True) if parts]
            columns = {LABEL: [parts[0] for parts in classes if parts]}
        else:
            columns = {}
        columns = {"image": list(map(str, usable)), **columns}
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(file: Path, images: Sequence[Path], left_out: Counter[str]) -> dict[str, list[Any]]:
    """Columns of a split whose images are listed in a metadata file."""
    folder = file.parent
    read = {".csv": pa.csv.read_csv, ".jsonl": pa.json.read_json, ".parquet": pa.parquet.read_table}
    try:
        columns = read[file.suffix](file).to_pydict()
    except pa.ArrowException as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    if "file_name" not in columns or "image" in columns:
        raise ValueError(
            f"{file} has the columns {', '.join(columns)}: it has a column file_name, and none "
            "called image"
        )
    known = {path.relative_to(folder).as_posix() for path in images}
    names = [PurePosixPath(str(name)).as_posix() for name in columns.pop("file_name")]
    for row, name in enumerate(names):
        if name not in known:
            raise ValueError(f"row {row} of {file}: there is no image {name!r} in {folder}")
    left_out[f"that {file.name} does not list"] += len(known - set(names))
    return {"image": [str(folder / name) for name in names], **columns}
