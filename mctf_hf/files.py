"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MODE = "r+b" if os.name == "nt" else "rb"  # that a file's content can be seen to the disk in


@contextmanager
def drafts(folder: str | os.PathLike, last: str | None = None) -> Iterator[Path]:
    """A new folder, whose files go to ``folder`` when the block has ended well.

    It lies in ``folder``, under a name that nobody knows before, and is gone in the end. Files are
    seen to the disk before the first one takes its place; a link there is replaced, not followed.

    Args:
        folder: it exists.
        last: name of the file that takes its place after all others.

    Raises:
        IsADirectoryError: if a folder lies where a file is to go; nothing is replaced then.
        OSError: if the disk is full, for one; likewise.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as place:
        yield Path(place)
        names = sorted(os.listdir(place), key=lambda name: (name == last, name))
        for name in names:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise IsADirectoryError(f"{folder / name} cannot be written: it is a folder")
            with Path(place, name).open(_MODE) as file:
                os.fsync(file.fileno())
        for name in names:
            os.replace(Path(place, name), folder / name)


@contextmanager
def draft(file: str | os.PathLike) -> Iterator[Path]:
    """A path to write instead of ``file``, as in :func:`drafts`: of the same name, elsewhere.

    What is written beside it goes along, first.
    """
    file = Path(file)
    with drafts(file.parent, file.name) as folder:
        yield folder / file.name


def replace(file: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file at the path it is given, and put that in the place of ``file``."""
    with draft(file) as path:
        write(path)


def write_text(file: str | os.PathLike, text: str) -> None:
    """Put a text, in UTF-8, in the place of a file."""
    replace(file, lambda path: path.write_text(text, encoding="utf-8"))
