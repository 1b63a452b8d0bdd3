"""Locks that allow one run at a time in a folder."""

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
    """Lock of a folder, held by one process until it releases the lock or ends in any way.

    Args:
        folder: folder that the process writes to.
        setting: name of the setting for the folder, for error messages.
        beside: put the files of the lock beside the folder, not into it.
    """

    def __init__(self, folder: str | os.PathLike, setting: str, *, beside: bool = False):
        self.folder = Path(folder)
        self.setting = setting
        place = self.folder.resolve()
        self._file = place.parent / f".{place.name}.lock" if beside else place / ".run.lock"
        self._owner = self._file.with_suffix(".owner")
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Create the folder of the lock files if needed, and lock.

        Raises:
            RuntimeError: if another run holds the lock; the message names its process.
            OSError: if the folder of the lock files cannot be created or written to.
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
        """Release the lock if it is held."""
        if self._lock is None:
            return
        for file in (self._owner, self._file):
            with contextlib.suppress(OSError):  # Windows cannot delete open files
                file.unlink()
        self._lock.release()
        self._lock = None
