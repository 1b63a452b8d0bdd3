"""Collections of images of any size, cut into units: always the same ones, each read in order.

A unit is some files of a folder, some rows of parquet files or of a dataset, a tar file, or a shard
of a stream. Whoever reads it again finds the same images under the same names.
"""

import hashlib
import itertools
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, List, Value
from datasets import Image as ImageFeature

from mctf_hf.images import is_image_name

from .datasets_private import fingerprint
from .folders import Found, walk_images
from .images import find_image_column
from .opening import NamedDataset
from .ranks import warn_once

ROWS_AT_ONCE = 64  # images that are in memory undecoded
READERS = 16  # of files that may lie far away


class StoredImage(NamedTuple):
    """An image that is not decoded yet.

    Attributes:
        id: which names it in its source.
        stored: what :func:`mctf_hf.images.decode` takes.
        columns: what is carried along, by name.
        problem: why there is no image, if that is known already.
    """

    id: str
    stored: Any
    columns: dict[str, Any]
    problem: str | None = None


class ImageSource(ABC):
    """Images in units.

    Args:
        origin: what errors call it.
        features: of the columns that are carried along, by name.

    Attributes:
        kind: what it is, in words.
        num_units: how many units there are.
        num_images: how many images, where that is known before they are read.
    """

    kind: ClassVar[str]

    def __init__(self, origin: str, features: Features):
        self.origin = origin
        self.features = features
        self.num_units = 0
        self.num_images: int | None = None

    @abstractmethod
    def read(self, unit: int) -> Iterator[StoredImage]:
        """The images of a unit, in order.

        Raises:
            ValueError: for a file that is damaged as a whole.
            OSError: for one that can't be reached.
        """

    @abstractmethod
    def _identity(self) -> Iterable[str]:
        """What tells this collection from another one."""

    def digest(self) -> str:
        """A number that changes with what is in the collection, as far as its names tell."""
        found = hashlib.sha256()
        for text in self._identity():
            found.update(text.encode(errors="surrogateescape") + b"\0")
        return found.hexdigest()[:16]

    def units_of(self, number: int, size: int) -> None:
        """Cut so many images into units of one size."""
        self.num_images, self.num_units = number, -(-number // size)


class FolderSource(ImageSource):
    """Image files, by their paths in a folder.

    Args:
        paths: of the files in the folder, sorted.
        folder: of the file system.
    """

    kind = "image files"

    def __init__(self, origin: str, paths: Sequence[str], folder: str, files: Any, unit_size: int):
        super().__init__(origin, Features({}))
        self.paths, self.folder, self.files, self.unit_size = paths, folder, files, unit_size
        self.units_of(len(paths), unit_size)

    def _identity(self) -> Iterable[str]:
        return self.paths

    def read(self, unit: int) -> Iterator[StoredImage]:
        paths = self.paths[unit * self.unit_size : (unit + 1) * self.unit_size]
        if _is_local(self.files):
            yield from (StoredImage(_as_text(path), f"{self.folder}/{path}", {}) for path in paths)
            return
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), ROWS_AT_ONCE):
                yield from pool.map(self._fetch, paths[start : start + ROWS_AT_ONCE])

    def _fetch(self, path: str) -> StoredImage:
        try:
            content = self.files.cat_file(f"{self.folder}/{path}")
        except FileNotFoundError:
            return StoredImage(_as_text(path), None, {}, "the file is gone")
        return StoredImage(_as_text(path), {"bytes": content, "path": None}, {})


class ParquetSource(ImageSource):
    """Rows of parquet files, one file after the other.

    Args:
        image_column: of the images; unset, the only one.
        columns: that are carried along.

    Raises:
        ValueError: for a file that is damaged, files of different columns, or a column that is not
            there or can't be told from others.
    """

    kind = "rows of parquet files"

    def __init__(
        self,
        origin: str,
        paths: Sequence[str],
        files: Any,
        unit_size: int,
        image_column: str | None,
        columns: Sequence[str],
    ):
        self.paths, self.files, self.unit_size = paths, files, unit_size
        with ThreadPoolExecutor(READERS) as pool:
            footers = list(pool.map(self._footer, paths))
        rows, schema = [count for count, _ in footers], footers[0][1]
        known = _features(schema)
        self.image_column = _parquet_images(schema, known, origin, image_column)
        super().__init__(origin, _carried(known, columns, origin))
        wanted = [self.image_column, *columns]
        for path, (_, other) in zip(paths, footers, strict=True):
            if any(
                name not in other.names or other.field(name).type != schema.field(name).type
                for name in wanted
            ):
                raise ValueError(
                    f"{path} has the columns {', '.join(other.names)}, and not all of "
                    f"{', '.join(wanted)} as {paths[0]} has them"
                )
        self.ends = list(itertools.accumulate(rows))
        self.units_of(self.ends[-1], unit_size)

    def _footer(self, path: str) -> tuple[int, pa.Schema]:
        with self._open(path) as file:
            return file.metadata.num_rows, file.schema_arrow

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.files.open(path, "rb"))
        except pa.ArrowException as error:
            raise ValueError(f"{path} can't be read as parquet: {error}") from error

    def _identity(self) -> Iterable[str]:
        yield self.image_column
        for path, end in zip(self.paths, self.ends, strict=True):
            yield f"{path} {end}"

    def read(self, unit: int) -> Iterator[StoredImage]:
        start = unit * self.unit_size
        stop, first = min(start + self.unit_size, self.ends[-1]), 0
        for path, end in zip(self.paths, self.ends, strict=True):
            if end > start and first < stop:
                yield from self._rows(path, max(start, first), min(stop, end), first)
            first = end

    def _rows(self, path: str, start: int, stop: int, first: int) -> Iterator[StoredImage]:
        """Rows of one file, by their numbers in all files; ``first`` is that of its first row."""
        carried = list(self.features)
        with self._open(path) as file:
            groups, number = [], first
            skipped = None
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows > start and number < stop:
                    groups.append(group)
                    skipped = number if skipped is None else skipped
                number += rows
            number = start if skipped is None else skipped
            names = [self.image_column, *carried]
            try:
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=names):
                    low, high = max(start - number, 0), min(stop - number, batch.num_rows)
                    if low < high:
                        part = batch.slice(low, high - low).to_pydict()
                        for i, stored in enumerate(part[self.image_column]):
                            columns = {name: part[name][i] for name in carried}
                            yield StoredImage(str(number + low + i), _as_stored(stored), columns)
                    number += batch.num_rows
                    if number >= stop:
                        return
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} can't be read as parquet: {error}") from error


class TarSource(ImageSource):
    """Samples of tar files in WebDataset format, each file a unit.

    Args:
        image_column: ending of the images' names; unset, any that is one of an image.
        columns: endings of other files of a sample, whose text is carried along.
    """

    kind = "tar files"

    def __init__(
        self,
        origin: str,
        paths: Sequence[str],
        files: Any,
        image_column: str | None,
        columns: Sequence[str],
    ):
        super().__init__(origin, Features({name: Value("string") for name in columns}))
        self.paths, self.files, self.image_column = paths, files, image_column
        self.num_units = len(paths)

    def _identity(self) -> Iterable[str]:
        with ThreadPoolExecutor(READERS) as pool:
            sizes = pool.map(self.files.size, self.paths)
            yield from (f"{path} {size}" for path, size in zip(self.paths, sizes, strict=True))

    def read(self, unit: int) -> Iterator[StoredImage]:
        path = self.paths[unit]
        name, last = path.rpartition("/")[2], "the beginning"
        with self.files.open(path, "rb") as opened:
            samples = _samples(opened)
            while True:
                try:
                    key, parts = next(samples)
                except StopIteration:
                    return
                except (tarfile.TarError, EOFError) as error:
                    problem = f"the tar file is damaged behind {last}: {error}"
                    yield StoredImage(f"{name}/", None, dict.fromkeys(self.features), problem)
                    return
                last = key
                columns = {column: parts.get(column) for column in self.features}
                yield StoredImage(
                    f"{name}/{key}",
                    *self._image(parts, columns),
                )

    def _image(
        self, parts: dict[str, bytes], columns: dict[str, bytes | None]
    ) -> tuple[Any, dict[str, Any], str | None]:
        texts: dict[str, Any] = {
            name: None if part is None else part.decode(errors="backslashreplace")
            for name, part in columns.items()
        }
        found = [name for name in parts if is_image_name(f"x.{name}")]
        if self.image_column is not None:
            found = [name for name in parts if name == self.image_column]
        if len(found) != 1:
            what = "no image" if not found else f"{len(found)} images ({', '.join(found)})"
            return None, texts, f"the sample has {what} among {', '.join(parts)}"
        return {"bytes": parts[found[0]], "path": None}, texts, None


class RowsSource(ImageSource):
    """Rows of a dataset that is stored, by their numbers."""

    kind = "rows"

    def __init__(
        self,
        origin: str,
        rows: Any,
        unit_size: int,
        image_column: str | None,
        columns: Sequence[str],
    ):
        super().__init__(origin, _carried(rows.features, columns, origin))
        self.image_column = find_image_column(rows, origin, image_column)
        kept = rows.select_columns([self.image_column, *columns])
        self.rows = kept.cast_column(self.image_column, ImageFeature(decode=False))
        self.unit_size = unit_size
        self.units_of(len(rows), unit_size)

    def _identity(self) -> Iterable[str]:
        return self.origin, self.image_column, str(self.num_images), fingerprint(self.rows)

    def read(self, unit: int) -> Iterator[StoredImage]:
        first = unit * self.unit_size
        for row in range(first, min(first + self.unit_size, len(self.rows))):
            columns = self.rows[row]
            yield StoredImage(str(row), columns.pop(self.image_column), columns)


class StreamSource(ImageSource):
    """Rows of a dataset that is read as a stream, each of its shards a unit."""

    kind = "shards of a stream"

    def __init__(self, origin: str, rows: Any, image_column: str | None, columns: Sequence[str]):
        self.image_column = find_image_column(rows, origin, image_column)
        super().__init__(origin, _carried(rows.features, columns, origin))
        kept = rows.select_columns([self.image_column, *columns])
        self.rows = kept.cast_column(self.image_column, ImageFeature(decode=False))
        self.num_units = rows.num_shards

    def _identity(self) -> Iterable[str]:
        return self.origin, self.image_column, str(self.num_units)

    def read(self, unit: int) -> Iterator[StoredImage]:
        for row, columns in enumerate(self.rows.shard(self.num_units, unit)):
            yield StoredImage(f"{unit}-{row}", columns.pop(self.image_column), columns)


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
        images: a folder, searched with its subfolders, of parquet files, of tar files or of images,
            whichever of these is found first; one such file; a pattern of names (``*``); each of
            them local or by a URL of fsspec. Or a dataset's id on the Hub.
        split: of a dataset; with a local folder, ``datasets`` reads it then.
        name, revision: of a dataset on the Hub.
        streaming: do not store a dataset of the Hub.
        image_column: of the images; unset, the only one. Of tar files, the ending of their names.
        columns: that are carried along.
        unit_size: images of a unit; a tar file or a shard of a stream is one as it is.

    Raises:
        ValueError: if there are no images, for columns that are missing, or settings without
            effect.
        OSError: for a source that does not exist or can't be reached.
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
                f"split is not set, and {images} has several: it is one of "
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
    except (ImportError, ValueError) as error:  # of a protocol that is unknown, or not installed
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
        tables = sorted(path for path in _listed(files, place) if _ending(path) == ".parquet")
        tars = sorted(path for path in _listed(files, place) if _ending(path) == ".tar")
        found = tables or tars
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
    if _is_local(files):
        paths = [str(path.relative_to(place)) for path in walk_images(Path(place), left_out)]
        paths = [path.replace(os.sep, "/") for path in paths]
    else:
        paths = [path[len(place) :].lstrip("/") for path in _listed(files, place)]
        paths = sorted(path for path in paths if is_image_name(path))
    rest = f": left out are {left_out.summary()}" if left_out.left_out else ""
    if not paths:
        raise ValueError(f"images={images!r} holds no images{rest}")
    if rest:
        warn_once(f"{images}: files are left out: {left_out.summary()}")
    return FolderSource(images, paths, place, files, unit_size)


def _listed(files: Any, folder: str) -> Iterator[str]:
    """Files below a folder but hidden ones, in no order."""
    for path in files.find(folder):
        parts = path[len(folder) :].split("/")
        if not any(part.startswith((".", "__")) for part in parts):
            yield path


def _as_text(path: str) -> str:
    """A path that may be no text, as parquet can hold it."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def _check_some(source: ImageSource) -> None:
    if not source.num_images:
        raise ValueError(f"{source.origin} has no images: it has no rows")


def _features(schema: pa.Schema) -> Features:
    """The columns of parquet files, as ``datasets`` wrote them or as they are."""
    described = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(described).get("info", {}).get("features") if described else None
    if features and set(features) == set(schema.names):
        return Features.from_dict(features)
    return Features.from_arrow_schema(schema.remove_metadata())


def _parquet_images(
    schema: pa.Schema, known: Features, origin: str, image_column: str | None
) -> str:
    """The column of images: one that is said to hold them, or the only one of bytes."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            names = [kind.field(i).name for i in range(kind.num_fields)]
            return "bytes" in names and holds_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    of_type_image = [name for name, feature in known.items() if isinstance(feature, ImageFeature)]
    bare = [field.name for field in schema if holds_bytes(field.type)]
    found = [image_column] if image_column is not None else of_type_image or bare
    if len(found) != 1 or found[0] not in bare:
        setting = f"image_column={image_column!r}" if image_column else "image_column is not set"
        raise ValueError(
            f"{setting}, and {origin} has {'no' if not bare else len(bare)} column of images among "
            f"{', '.join(schema.names)}: it is one of bytes"
            + (f", {' or '.join(bare)}" if bare else "")
        )
    return found[0]


def _carried(known: Features, columns: Sequence[str], origin: str) -> Features:
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(
            f"columns={','.join(columns)!r} is not allowed: {origin} has no {missing[0]!r}, only "
            f"{', '.join(known)}"
        )
    for name in columns:
        if not isinstance(known[name], Value | ClassLabel | List):
            raise ValueError(
                f"columns={','.join(columns)!r} is not allowed: {name!r} of {origin} holds "
                f"{known[name]}, where numbers, texts, classes and lists are carried along"
            )
    return Features({name: known[name] for name in columns})


def _as_stored(value: Any) -> Any:
    """What a parquet file holds of an image, as ``datasets`` gives it."""
    if value is None or (isinstance(value, dict) and value.get("bytes") is None):
        return None  # a path leads to wherever the file was written
    return {"bytes": value["bytes"] if isinstance(value, dict) else value, "path": None}


def _samples(opened: Any) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Files of a tar that go together, by the part of their path up to the first dot of the name.

    Yields:
        That part, and the files by what follows the dot.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=opened, mode="r|*") as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            if not member.isfile() or file.startswith((".", "__")):
                continue
            stem, _, ending = file.partition(".")
            own = f"{folder}/{stem}" if folder else stem
            if own != key and parts:
                assert key is not None
                yield key, parts
                parts = {}
            key = own
            content = archive.extractfile(member)
            assert content is not None
            parts[ending.lower()] = content.read()
    if parts:
        assert key is not None
        yield key, parts
