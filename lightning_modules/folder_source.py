"""Image source for the files of a local or remote folder."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import Features

from .image_units import READERS, ROWS_AT_ONCE, ImageSource, StoredImage, as_text, is_local


class FolderSource(ImageSource):
    """Image files of a folder; an image's id is its path in the folder.

    Args:
        paths: paths of the files in the folder, sorted.
        folder: path of the folder in the file system.
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
        if is_local(self.files):
            yield from (StoredImage(as_text(path), f"{self.folder}/{path}", {}) for path in paths)
            return
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), ROWS_AT_ONCE):
                yield from pool.map(self._fetch, paths[start : start + ROWS_AT_ONCE])

    def _fetch(self, path: str) -> StoredImage:
        try:
            content = self.files.cat_file(f"{self.folder}/{path}")
        except FileNotFoundError:
            return StoredImage(as_text(path), None, {}, "the file is gone")
        return StoredImage(as_text(path), {"bytes": content, "path": None}, {})
