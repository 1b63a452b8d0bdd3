"""Collections of images of any size, cut into units: always the same ones, each read in order.

A unit is some files of a folder, some rows of parquet files or of a dataset, a tar file, or a shard
of a stream. Whoever reads it again finds the same images under the same names.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from datasets import ClassLabel, Features, List, Value

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


def as_text(path: str) -> str:
    """A path that may be no text, as parquet can hold it."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def carried(known: Features, columns: Sequence[str], origin: str) -> Features:
    """Those of the columns that are carried along.

    Raises:
        ValueError: for one that is missing, or holds what is not carried along.
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
    """Whether a file system of fsspec is that of this machine."""
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)
