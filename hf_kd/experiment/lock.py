"""Who trains a run: a lock in its folder, so that no two processes write into one."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # Windows: only the process id in the file tells
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"


class RunLock:
    """The right to train one run, held by one process until `release` or its end.

    The lock file holds process id and host and stays behind, as the mark that somebody started the run. The lock
    itself is POSIX's (`fcntl.lockf`): it ends with the process, however that ends, and the workers of a data loader do
    not inherit it, so that a killed run can be resumed at once. It also holds between machines on NFS 4, and on NFS 3
    with a lock daemon. Where the file system has no such locks, a lock counts as stale if its process is gone from
    this host; one of another host must be removed by hand.

    Args:
        folder: of the run; made where it is missing.
    """

    def __init__(self, folder: str | os.PathLike):
        self.file = Path(folder) / LOCK_FILE
        self._handle: int | None = None

    @property
    def started(self) -> bool:
        """Whether somebody has started this run, now or earlier."""
        return self.file.exists()

    def acquire(self, new: bool) -> bool:
        """Takes the lock.

        Args:
            new: only if nobody has started the run yet.

        Returns:
            Whether it is held now: False if another process holds it, or, with `new`, has started the run.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o644)
        except FileExistsError:
            return False
        if not self._lock(handle):
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        self._handle = handle
        return True

    def release(self) -> None:
        """Gives the lock back; the file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def holder(self) -> str:
        """Process and host that the file names, for messages."""
        try:
            owner = json.loads(self.file.read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def _lock(self, handle: int) -> bool:
        if fcntl is not None:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
        return not self._alive()

    def _alive(self) -> bool:
        try:
            owner = json.loads(self.file.read_text())
            return owner["host"] != socket.gethostname() or psutil.pid_exists(owner["pid"])
        except (OSError, ValueError, KeyError):
            return False
