"""One run at a time in a folder."""

import contextlib
import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from mctf_hf.files import write_text

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class FolderLock:
    """Holds a folder for one process, until it lets go or ends, however it ends.

    Args:
        folder: which the process writes to.
        setting: that named the folder, for errors.
        beside: keep the lock's files beside the folder, where it must hold nothing else.
    """

    def __init__(self, folder: str | os.PathLike, setting: str, *, beside: bool = False):
        self.folder = Path(folder)
        self.setting = setting
        place = self.folder.resolve()
        self._file = place.parent / f".{place.name}.lock" if beside else place / ".run.lock"
        self._owner = self._file.with_suffix(".owner")
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Make the folder's place, if need be, and hold it.

        Raises:
            RuntimeError: if another run holds it; its process is named.
            OSError: if the place can't be made or written to.
        """
        lock = FileLock(self._file, timeout=0)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            write_text(self._owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        except Timeout:
            raise RuntimeError(
                f"{self.setting}={str(self.folder)!r} is not allowed: another run writes to this "
                f"folder ({self._owner_text()}). Wait for it, or name another folder"
            ) from None
        except OSError as error:
            lock.release()
            if error.errno in _NO_LOCKS_HERE:
                rank_zero_warn(
                    f"{self.folder} lies where files can't be locked: see that no other run "
                    "writes to it"
                )
                return
            raise type(error)(
                f"{self.setting}={str(self.folder)!r} is not allowed: it can't be written to "
                f"({error.strerror or error})",
            ) from error
        self._lock = lock

    def _owner_text(self) -> str:
        try:
            return self._owner.read_text().strip()
        except OSError:
            return "its process is not known"

    def release(self) -> None:
        """Let go of it, if it is held."""
        if self._lock is None:
            return
        for file in (self._owner, self._file):
            with contextlib.suppress(OSError):  # an open file of Windows
                file.unlink()
        self._lock.release()
        self._lock = None
