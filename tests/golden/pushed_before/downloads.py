"""Weights that come from the Hub, checked against the checksums that they are kept under."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


@contextmanager
def checked_downloads(
    repo_id: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> Iterator[None]:
    """Compare every large file of a model that is downloaded meanwhile with its checksum.

    The Hub's client compares sizes only. It keeps a large file under the SHA-256 of its content,
    which the Hub states before the download; small files and those of earlier downloads are left
    alone, so that loading from the cache costs nothing more. Where the cache can hold no links
    (on Windows, without developer mode) files are kept under their own names and not checked.

    Args:
        repo_id: id of a model on the Hub; a local folder is never downloaded.
        cache_dir: the client's cache, if it is not the usual one.

    Raises:
        OSError: for a file that is not what the Hub has. It has then been removed from the cache.
    """
    if os.path.isdir(repo_id):
        yield
        return
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    folder /= repo_folder_name(repo_id=os.fspath(repo_id), repo_type="model")
    before = _large_files(folder)
    try:
        yield
    finally:
        for file, _ in sorted(_large_files(folder) - before):
            _check(file, folder, os.fspath(repo_id))


def _large_files(folder: Path) -> set[tuple[Path, tuple[int, int]]]:
    """Large files in the cache, and what tells a new one of the same name."""
    files = (folder / "blobs").glob("*") if (folder / "blobs").is_dir() else ()
    large = (file for file in files if re.fullmatch("[0-9a-f]{64}", file.name))
    return {(file, (file.stat().st_ino, file.stat().st_mtime_ns)) for file in large}


def _check(file: Path, folder: Path, repo_id: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if found == file.name:
        return
    links = [link for link in folder.glob("snapshots/*/*") if link.resolve() == file.resolve()]
    names = sorted({link.name for link in links}) or [file.name]
    for path in (*links, file):
        path.unlink(missing_ok=True)
    raise OSError(
        f"{', '.join(names)} of {repo_id} arrived damaged: its SHA-256 is {found}, the Hub's file "
        f"has {file.name}. It has been removed from the cache: load the model again"
    )
