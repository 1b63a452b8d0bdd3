"""Image sources for datasets; a unit is a range of rows or a shard of a stream."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Image as ImageFeature

from .columns import find_image_column
from .datasets_private import fingerprint
from .image_units import ImageSource, StoredImage, carried


class RowsSource(ImageSource):
    """Rows of a stored dataset; an image's id is the number of its row."""

    kind = "rows"

    def __init__(
        self,
        origin: str,
        rows: Any,
        unit_size: int,
        image_column: str | None,
        columns: Sequence[str],
    ):
        super().__init__(origin, carried(rows.features, columns, origin))
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
    """Rows of a dataset that is read as a stream; each shard is a unit."""

    kind = "shards of a stream"

    def __init__(self, origin: str, rows: Any, image_column: str | None, columns: Sequence[str]):
        self.image_column = find_image_column(rows, origin, image_column)
        super().__init__(origin, carried(rows.features, columns, origin))
        kept = rows.select_columns([self.image_column, *columns])
        self.rows = kept.cast_column(self.image_column, ImageFeature(decode=False))
        self.num_units = rows.num_shards

    def _identity(self) -> Iterable[str]:
        return self.origin, self.image_column, str(self.num_units)

    def read(self, unit: int) -> Iterator[StoredImage]:
        for row, columns in enumerate(self.rows.shard(self.num_units, unit)):
            yield StoredImage(f"{unit}-{row}", columns.pop(self.image_column), columns)
