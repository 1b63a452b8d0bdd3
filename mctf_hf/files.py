"""Reading of files with checks, and writing of files completely or not at all."""

import csv
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# Names that transformers gives to the files of a model's weights.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_MOST_JSON = 2**26  # bytes
_MODE = "r+b" if os.name == "nt" else "rb"  # mode of opening that fsync needs


@contextmanager
def drafts(folder: str | os.PathLike, last: str | None = None) -> Iterator[Path]:
    """A temporary folder, whose files move to ``folder`` if the block ends without an error.

    The temporary folder is in ``folder``, has a random name and is always removed. All files are
    flushed to disk before the first one moves. Links to be replaced are not followed.

    Args:
        folder: existing folder.
        last: name of the file that moves after all others.

    Raises:
        IsADirectoryError: if a folder has the name of a file to move; no file has moved then.
        OSError: if writing fails, for example because the disk is full; no file has moved then.
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
    """A path with the name of ``file`` in a temporary folder, to write to; see :func:`drafts`.

    Other files that are written to the same folder move first.
    """
    file = Path(file)
    with drafts(file.parent, file.name) as folder:
        try:
            yield folder / file.name
        except OSError as error:
            if error.filename is None or Path(str(error.filename)).is_relative_to(folder):
                error.filename = str(file)  # the caller's path; a full disk gives no filename
            raise


def replace(file: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` create a file at a temporary path, and replace ``file`` by it."""
    with draft(file) as path:
        write(path)


def write_text(file: str | os.PathLike, text: str) -> None:
    """Replace a file by a text in UTF-8."""
    replace(file, lambda path: path.write_text(text, encoding="utf-8"))


def read_object(file: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not regular, too large, not JSON, or contains no object.
    """
    file = Path(file)
    if file.exists() and not file.is_file():  # reading a pipe would block
        raise ValueError(f"{file} is not allowed: it is no file")
    if (size := file.stat().st_size) > _MOST_JSON:
        raise ValueError(f"{file} is not allowed: {size:,} bytes of JSON, more than {_MOST_JSON:,}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        held = "a list" if isinstance(content, list) else json.dumps(content)[:40]
        raise ValueError(f"{file} is not allowed: it holds {held}, not a JSON object")
    return content


def read_index(file: str | os.PathLike) -> dict[str, str]:
    """Read the index of sharded weights: for each weight, the file in the folder of the index.

    Raises:
        ValueError: if the index names no files, or anything but files of its folder.
    """
    index = read_object(file)
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{file} is not allowed: its metadata is to be a JSON object")
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(is_plain_name, files.values())):
        raise ValueError(
            f"{file} is not allowed: its weight_map is to name a file of the folder for each weight"
        )
    return files


def check_indexes(folder: str | os.PathLike) -> None:
    """Check all indexes of sharded weights in a folder; a path that is no folder has none.

    Raises:
        ValueError: see :func:`read_index`.
    """
    for index in Path(folder).glob("*.index.json"):
        read_index(index)


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is a plain file name, which cannot lead out of its folder."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def drop_links(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Remove links that have the names of a model's configuration or weights, or given names.

    Libraries that follow links then write to the folder itself.
    """
    configurations = {"config.json", "generation_config.json"}
    for file in Path(folder).glob("*"):
        ours = file.name in {*configurations, *names} or WEIGHTS.fullmatch(file.name)
        if ours and file.is_symlink():
            file.unlink()


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with ``'`` before texts that a spreadsheet would read as formulas."""
    writer = csv.DictWriter(file, [_harmless(column) for column in columns])
    writer.writeheader()
    writer.writerows({_harmless(key): _harmless(cell) for key, cell in row.items()} for row in rows)


def _harmless(cell: Any) -> Any:
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if formula else cell
