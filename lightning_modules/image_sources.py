"""Opening of image collections by name: folders, files, URLs and datasets of the Hub."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from mctf_hf.images import is_image_name

from .dataset_source import RowsSource, StreamSource
from .folder_source import FolderSource
from .folders import Found, walk_images
from .image_units import ImageSource, is_local
from .opening import NamedDataset
from .parquet_source import ParquetSource
from .ranks import warn_once
from .tar_source import TarSource


def open_source(
    images: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    columns: Sequence[str] = (),
    unit_size: int = 1000,
) -> ImageSource:
    """Open a collection of images.

    Args:
        images: a folder, one parquet or tar file, or a pattern of such names (``*``), as a local
            path or fsspec URL; or the id of a dataset on the Hub. Of a folder and its subfolders,
            one kind of files is read: parquet files, otherwise tar files, otherwise images.
        split: split of a dataset; a local folder with a split is opened as a dataset.
        name: configuration of a dataset on the Hub.
        revision: branch, tag or commit of a dataset on the Hub.
        streaming: read a dataset as a stream, without storing it.
        image_column: image column; unset, the only one. For tar files, extension of the images.
        columns: names of the columns to carry along.
        unit_size: images per unit; a tar file or a shard of a stream always is one unit.

    Raises:
        ValueError: for no images, a missing column, or a setting without effect.
        OSError: if the source does not exist or cannot be reached.
    """
    if not images:
        raise ValueError("images='' is not allowed: name a folder, a URL or a dataset of the Hub")
    here = "://" in images or os.path.exists(images) or any(sign in images for sign in "*?")
    here = here or images.startswith((".", "/", "~"))
    given = {"split": split, "name": name, "revision": revision, "streaming": streaming or None}
    dataset = not here or (split is not None and "://" not in images)
    if not dataset:
        unused = sorted(key for key, value in given.items() if value is not None)
        if unused:
            raise ValueError(
                f"{', '.join(unused)} is not allowed with images={images!r}: that is of a dataset "
                "on the Hub (split alone also of a local one)"
            )
        return _open_files(images, image_column, columns, unit_size)
    named = NamedDataset(images, name, revision)
    if split is None:
        if len(named.splits) > 1:
            raise ValueError(
                f"split is not set, and {images} has several: it must be one of "
                f"{', '.join(named.splits)}"
            )
        (split,) = named.splits
    rows, origin = named.load(split, streaming=streaming), f"{images}, split {split}"
    source: ImageSource
    if streaming:
        source = StreamSource(origin, rows, image_column, columns)
        source.num_images = named.count(split)
    else:
        source = RowsSource(origin, rows, unit_size, image_column, columns)
        _check_some(source)
    return source


def _open_files(
    images: str, image_column: str | None, columns: Sequence[str], unit_size: int
) -> ImageSource:
    try:
        files, place = fsspec.core.url_to_fs(images)
    except (ImportError, ValueError) as error:  # unknown protocol, or its package is missing
        raise ValueError(f"images={images!r} can't be opened: {error}") from error
    place = place.rstrip("/") or "/"
    found: list[str] = []
    if files.isfile(place):
        found = [place]
    elif not files.isdir(place) and any(sign in place for sign in "*?"):
        found = sorted(files.glob(place))
    if not found and not files.isdir(place):
        raise FileNotFoundError(f"images={images!r}: there is no such folder or file")
    if found:
        others = sorted({_ending(path) for path in found} - {".parquet", ".tar"})
        if others:
            raise ValueError(
                f"images={images!r} is not allowed: it names files of {', '.join(others)}, where "
                "single files are .parquet or .tar"
            )
    else:
        listed = sorted(_listed(files, place))
        found = [path for path in listed if _ending(path) == ".parquet"]
        found = found or [path for path in listed if _ending(path) == ".tar"]
    if found:
        kinds = {_ending(path) for path in found}
        if len(kinds) > 1:
            raise ValueError(
                f"images={images!r} is not allowed: it names parquet files and tar files"
            )
        source: ImageSource
        if kinds == {".tar"}:
            source = TarSource(images, found, files, image_column, columns)
        else:
            source = ParquetSource(images, found, files, unit_size, image_column, columns)
            _check_some(source)
        return source
    unused = [f"image_column={image_column!r}"] if image_column is not None else []
    unused += [f"columns={','.join(columns)!r}"] if columns else []
    if unused:
        raise ValueError(
            f"{', '.join(unused)} is not allowed with images={images!r}, a folder of image files, "
            "which have no columns"
        )
    left_out = Found()
    if is_local(files):
        paths = [str(path.relative_to(place)) for path in walk_images(Path(place), left_out)]
        paths = [path.replace(os.sep, "/") for path in paths]
    else:
        paths = [path[len(place) :].lstrip("/") for path in listed if is_image_name(path)]
    rest = f": left out are {left_out.summary()}" if left_out.left_out else ""
    if not paths:
        raise ValueError(f"images={images!r} holds no images{rest}")
    if rest:
        warn_once(f"{images}: files are left out: {left_out.summary()}")
    return FolderSource(images, paths, place, files, unit_size)


def _listed(files: Any, folder: str) -> Iterator[str]:
    """Yield the files below a folder, except hidden ones, in no particular order."""
    for path in files.find(folder):
        parts = path[len(folder) :].split("/")
        if not any(part.startswith((".", "__")) for part in parts):
            yield path


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _check_some(source: ImageSource) -> None:
    if not source.num_images:
        raise ValueError(f"{source.origin} has no images: it has no rows")
