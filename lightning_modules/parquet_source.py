"""Image source for parquet files; a unit is a range of rows."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as ImageFeature

from .image_units import READERS, ROWS_AT_ONCE, ImageSource, StoredImage, carried


class ParquetSource(ImageSource):
    """Rows of parquet files, one file after the other.

    Args:
        image_column: image column; unset, the only one.
        columns: names of the columns to carry along.

    Raises:
        ValueError: for a damaged file, files with different columns, or a column that is missing
            or cannot be determined.
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
        super().__init__(origin, carried(known, columns, origin))
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
        """Yield rows of one file, by their numbers over all files; its first row is ``first``."""
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


def _features(schema: pa.Schema) -> Features:
    """Features of parquet columns: those that ``datasets`` stored, or those of the schema."""
    described = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(described).get("info", {}).get("features") if described else None
    if features and set(features) == set(schema.names):
        return Features.from_dict(features)
    return Features.from_arrow_schema(schema.remove_metadata())


def _parquet_images(
    schema: pa.Schema, known: Features, origin: str, image_column: str | None
) -> str:
    """The image column: the given one, the only one of type image, or the only one of bytes."""

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
            f"{', '.join(schema.names)}: it must hold bytes"
            + (f", as {' or '.join(bare)} does" if bare else "")
        )
    return found[0]


def _as_stored(value: Any) -> Any:
    """Convert an image of a parquet file to the form that ``datasets`` stores."""
    if value is None or (isinstance(value, dict) and value.get("bytes") is None):
        return None  # a path is valid only where the file was written
    return {"bytes": value["bytes"] if isinstance(value, dict) else value, "path": None}
