"""Checksum verification of weights downloaded from the Hub."""

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
    """Verify the checksum of every large file of a model that is downloaded in the block.

    The Hub's client compares sizes only. It names a large file in the cache by the SHA-256 that the
    Hub states before the download. Small files and files of earlier downloads are not checked, so
    loading from the cache costs no extra time. If the cache supports no links (on Windows without
    developer mode), files keep their own names and are not checked.

    Args:
        repo_id: id of a model on the Hub; for a local folder nothing is checked.
        cache_dir: cache folder of the client; ``None`` for the default.

    Raises:
        OSError: if a file differs from the Hub's file; it is then removed from the cache.
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
    """Large files in the cache, each with its inode and time of change to detect a replacement."""
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
