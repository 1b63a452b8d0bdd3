"""Image source for tar files in WebDataset format; each file is a unit."""

import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import Features, Value

from mctf_hf.images import is_image_name

from .image_units import READERS, ImageSource, StoredImage


class TarSource(ImageSource):
    """Samples of tar files in WebDataset format.

    Args:
        image_column: extension of the images; unset, any extension of an image format.
        columns: extensions of other files of a sample, whose text is carried along. Upper and lower
            case of extensions are the same.
    """

    kind = "tar files"

    def __init__(
        self,
        origin: str,
        paths: Sequence[str],
        files: Any,
        image_column: str | None,
        columns: Sequence[str],
    ):
        super().__init__(origin, Features({name: Value("string") for name in columns}))
        self.paths, self.files, self.image_column = paths, files, image_column
        self.num_units = len(paths)
        common = posixpath.commonpath([posixpath.dirname(path) for path in paths])
        self.names = [posixpath.relpath(path, common) for path in paths]

    def _identity(self) -> Iterable[str]:
        with ThreadPoolExecutor(READERS) as pool:
            sizes = pool.map(self.files.size, self.paths)
            yield from (f"{path} {size}" for path, size in zip(self.paths, sizes, strict=True))

    def read(self, unit: int) -> Iterator[StoredImage]:
        name, last = self.names[unit], "the beginning"
        with self.files.open(self.paths[unit], "rb") as opened:
            samples = _samples(opened)
            while True:
                try:
                    key, parts = next(samples)
                except StopIteration:
                    return
                except (tarfile.TarError, EOFError) as error:
                    problem = f"the tar file is damaged behind {last}: {error}"
                    yield StoredImage(f"{name}/", None, dict.fromkeys(self.features), problem)
                    return
                last = key
                yield StoredImage(f"{name}/{key}", *self._image(parts))

    def _image(self, parts: dict[str, bytes]) -> tuple[Any, dict[str, Any], str | None]:
        texts: dict[str, Any] = {
            name: parts[key].decode(errors="backslashreplace") if key in parts else None
            for name, key in ((name, name.lower()) for name in self.features)
        }
        found = [name for name in parts if is_image_name(f"x.{name}")]
        if self.image_column is not None:
            found = [name for name in parts if name == self.image_column.lower()]
        if len(found) != 1:
            what = "no image" if not found else f"{len(found)} images ({', '.join(found)})"
            return None, texts, f"the sample has {what} among {', '.join(parts)}"
        return {"bytes": parts[found[0]], "path": None}, texts, None


def _samples(opened: Any) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group the files of a tar by their key: the path up to the first dot of the file name.

    Yields:
        The key, and the contents of its files by extension (the text after the dot).
    """
    key = ""
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=opened, mode="r|*") as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            if not member.isfile() or file.startswith((".", "__")):
                continue
            stem, _, ending = file.partition(".")
            own = f"{folder}/{stem}" if folder else stem
            if own != key and parts:
                yield key, parts
                parts = {}
            key = own
            content = archive.extractfile(member)
            assert content is not None
            parts[ending.lower()] = content.read()
    if parts:
        yield key, parts
