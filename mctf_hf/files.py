"""Files of a folder: read with suspicion, written whole or not at all."""

import csv
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# A model's weights, as transformers names them.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_MOST_JSON = 2**26  # bytes
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
        try:
            yield folder / file.name
        except OSError as error:
            if error.filename is None or Path(str(error.filename)).is_relative_to(folder):
                error.filename = str(file)  # as it was asked for; a full disk names none
            raise


def replace(file: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file at the path it is given, and put that in the place of ``file``."""
    with draft(file) as path:
        write(path)


def write_text(file: str | os.PathLike, text: str) -> None:
    """Put a text, in UTF-8, in the place of a file."""
    replace(file, lambda path: path.write_text(text, encoding="utf-8"))


def read_object(file: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    file = Path(file)
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file} is not allowed: it is no file")
    if (size := file.stat().st_size) > _MOST_JSON:
        raise ValueError(f"{file} is not allowed: {size:,} bytes of JSON, more than {_MOST_JSON:,}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not of its encoding, no JSON, nested too deep
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not allowed: it holds {_kind(content)}, not a JSON object")
    return content


def read_index(file: str | os.PathLike) -> dict[str, str]:
    """The file in the same folder that each weight is in, by an index of weights in parts.

    Raises:
        ValueError: if it names none, or something else.
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
    """Read the indexes of weights in a folder, if it is one.

    Raises:
        ValueError: see :func:`read_index`.
    """
    for index in Path(folder).glob("*.index.json"):
        read_index(index)


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else json.dumps(content)[:40]


def is_plain_name(name: object) -> bool:
    """Whether something is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def drop_links(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Remove links in the place of a model's configuration, weights and files of some names.

    What is written there by a library that follows links then stays in the folder.
    """
    configurations = {"config.json", "generation_config.json"}
    for file in Path(folder).glob("*"):
        ours = file.name in {*configurations, *names} or WEIGHTS.fullmatch(file.name)
        if ours and file.is_symlink():
            file.unlink()


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with ``'`` before texts that a spreadsheet would take for formulas."""
    writer = csv.DictWriter(file, [_harmless(column) for column in columns])
    writer.writeheader()
    writer.writerows({_harmless(key): _harmless(cell) for key, cell in row.items()} for row in rows)


def _harmless(cell: Any) -> Any:
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if formula else cell
