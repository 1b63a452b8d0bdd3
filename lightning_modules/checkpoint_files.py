"""Checkpoint files that are written completely or not at all, and checked when they are read.

A checkpoint is the zip archive that ``torch.save`` writes. The archive comment contains the SHA-256
of all bytes before it. File and digest are therefore always copied and moved together, and any zip
reader can read the file.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from mctf_hf.files import replace
from mctf_hf.weight_files import DAMAGED

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

T = TypeVar("T")

_BEGIN, _END = b"PK\x03\x04", b"PK\x05\x06"
_END_SIZE = 22  # bytes of an archive's last record; its last 2 are the length of the comment
_MARK = b"sha256:"
_SEAL_SIZE = len(_MARK) + 2 * hashlib.sha256().digest_size
_SEAL_LENGTH = _SEAL_SIZE.to_bytes(2, "little")
_CHUNK = 1 << 20


def write_seal(archive: io.BytesIO) -> None:
    """Append the digest to a complete archive that has no comment yet."""
    archive.seek(-2, os.SEEK_END)
    archive.write(_SEAL_LENGTH)
    with archive.getbuffer() as written:
        digest = hashlib.sha256(written).hexdigest()
    archive.write(_MARK + digest.encode())


def check_file(path: str | os.PathLike) -> None:
    """Compare a checkpoint with its digest, or, without a digest, with the archive's checksums.

    Raises:
        ValueError: if the file is damaged or not a checkpoint.
        OSError: if the file is missing or cannot be read.
    """
    if os.path.isdir(path):
        raise ValueError(
            f"{path} is a folder, not a checkpoint, which is a single file (a model's folder goes "
            "to --model.pretrained)"
        )
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    with open(path, "rb") as file:
        if file.read(len(_BEGIN)) != _BEGIN:
            size = os.fstat(file.fileno()).st_size
            raise _damaged(path, "it does not begin as one" if size else "it is empty")
        if _has_seal(file):
            _check_seal(path, file)
        else:
            _check_archive(path, file)


def _damaged(path: str | os.PathLike, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or no checkpoint, and can't be read: {reason}")


def _has_seal(file: IO[bytes]) -> bool:
    """False if the file ends like an archive without comment; otherwise True, even if damaged."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE))
    end = file.read()
    return not (end.startswith(_END) and end.endswith(b"\0\0"))


def _check_seal(path: str | os.PathLike, file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    left = max(0, size - _SEAL_SIZE)
    file.seek(left)
    seal = file.read()
    if not re.fullmatch(_MARK + rb"[0-9a-f]{64}", seal):
        raise _damaged(path, "its end, with its digest, is missing or changed")
    file.seek(0)
    digest = hashlib.sha256()
    while left:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise _damaged(path, "it became shorter while it was read")
        digest.update(chunk)
        left -= len(chunk)
    if seal != _MARK + digest.hexdigest().encode():
        raise _damaged(path, "its contents have changed since it was written (SHA-256)")


def _check_archive(path: str | os.PathLike, file: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except Exception as error:  # its type depends on where the damage is
        raise _damaged(path, str(error) or type(error).__name__) from error
    if wrong is not None:
        raise _damaged(path, f"the checksum of its part {wrong} is wrong")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints completely or not at all, and checks them when it reads them.

    Args:
        use_previous: if ``last.ckpt`` cannot be read, read ``previous.ckpt`` of the same folder.
    """

    def __init__(self, use_previous: bool = False):
        super().__init__()
        self.use_previous = use_previous

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a temporary file, flush it to the disk, and move it to ``path``.

        Raises:
            OSError: if the file cannot be written, for example because the disk is full; an older
                file at ``path`` is not changed.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_seal(buffer)
        try:
            replace(path, lambda draft: draft.write_bytes(buffer.getbuffer()))
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"{path} was not written ({error.strerror or error}, of "
                f"{len(buffer.getbuffer()):,} bytes): checkpoints saved before are unchanged. "
                "Resume from one of them when there is room",
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file that :meth:`save_checkpoint` wrote.

        Raises:
            ValueError: if the file is damaged or not a checkpoint, and ``use_previous`` does not
                replace it.
            FileNotFoundError: if the file is missing, likewise.
        """
        return self._with_previous(path, lambda file: self._load(file, *args, **kwargs))

    def whole_one(self, path: str | Path) -> str | Path:
        """Path of the checkpoint to resume from: ``path``, or ``previous.ckpt`` in its place.

        Raises:
            ValueError, FileNotFoundError: see :meth:`load_checkpoint`.
        """

        def checked(file: str | Path) -> str | Path:
            if "://" not in str(file):
                check_file(file)
            return file

        return self._with_previous(path, checked)

    def _with_previous(self, path: str | Path, read: Callable[[str | Path], T]) -> T:
        previous = Path(path).with_name(PREVIOUS)
        has_previous = Path(path).name == LAST and previous.exists()
        try:
            return read(path)
        except (FileNotFoundError, ValueError) as error:
            if not has_previous:
                raise
            if not self.use_previous:
                raise type(error)(
                    f"{error}. The one before it, {previous}, can be resumed from instead "
                    "(--last.use_previous true does so by itself)"
                ) from error
            rank_zero_warn(f"{error}. Resuming from the one before it, {previous}")
            return read(previous)

    def _load(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path):
            check_file(path)
        try:
            loaded = super().load_checkpoint(path, *args, **kwargs)
        except DAMAGED as error:
            if isinstance(error, pickle.UnpicklingError) and "Weights only" in str(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise _damaged(path, reason) from error
        if not isinstance(loaded, dict) or "state_dict" not in loaded:
            held = list(loaded)[:5] if isinstance(loaded, dict) else type(loaded).__name__
            raise _damaged(path, f"it holds no state of a training, but {held}")
        return loaded
