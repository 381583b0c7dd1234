"""Lets one process write a run at a time.  A dead process holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from ..errors import RunError


class WriterLock:
    """Holds ``path`` until ``release`` or the end of the process, however it ends.

    The kernel's lock on the open file counts, not the file, so a file left behind by a crash locks
    nothing.  Its content only names the holder.

    Raises:
        RunError: another process holds it; names that process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.note: str | None = None
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock()
                if _same_file(self._descriptor, path):  # else the last holder has just removed it
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Gives the lock back.  More than once does nothing."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"
                raise RunError(
                    f"{self._path.parent} is being written by {holder}: wait for it to end, "
                    "or use another folder"
                ) from error
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            self.note = (
                f"{self._path.parent} is on a file system without locks: let one process write it only"
            )


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
