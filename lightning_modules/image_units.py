"""Image collections of any size, divided into fixed units that are read in order.

A unit is a range of the files of a folder, a range of rows of parquet files or of a dataset, a tar
file, or a shard of a stream. A unit always contains the same images with the same ids.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from datasets import ClassLabel, Features, List, Value

ROWS_AT_ONCE = 64  # undecoded images in memory at once
READERS = 16  # threads that read files, which may be remote


class StoredImage(NamedTuple):
    """An image that is not decoded yet.

    Attributes:
        id: unique name in its source.
        stored: input of :func:`mctf_hf.images.decode`.
        columns: values of the carried columns, by name.
        problem: reason why there is no image, if already known.
    """

    id: str
    stored: Any
    columns: dict[str, Any]
    problem: str | None = None


class ImageSource(ABC):
    """A collection of images in units.

    Args:
        origin: name of the collection in error messages.
        features: features of the carried columns, by name.

    Attributes:
        kind: short description of the kind of source.
        num_units: number of units.
        num_images: number of images, if known before they are read.
    """

    kind: ClassVar[str]

    def __init__(self, origin: str, features: Features):
        self.origin = origin
        self.features = features
        self.num_units = 0
        self.num_images: int | None = None

    @abstractmethod
    def read(self, unit: int) -> Iterator[StoredImage]:
        """Yield the images of a unit, in order.

        Raises:
            ValueError: if a file, not only an image, is damaged.
            OSError: if a file cannot be reached.
        """

    @abstractmethod
    def _identity(self) -> Iterable[str]:
        """Texts that identify this collection."""

    def digest(self) -> str:
        """Hash of the collection's identity, such as names and sizes; it reads no pixels."""
        found = hashlib.sha256()
        for text in self._identity():
            found.update(text.encode(errors="surrogateescape") + b"\0")
        return found.hexdigest()[:16]

    def units_of(self, number: int, size: int) -> None:
        """Divide ``number`` images into units of ``size`` images."""
        self.num_images, self.num_units = number, -(-number // size)


def as_text(path: str) -> str:
    """Convert a path, which may be invalid UTF-8, to text that parquet can store."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def carried(known: Features, columns: Sequence[str], origin: str) -> Features:
    """Features of the columns that are carried along.

    Raises:
        ValueError: for a column that is missing or of an unsupported type.
    """
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


def is_local(files: Any) -> bool:
    """Whether an fsspec file system is the local one."""
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)
