"""Who trains a run: a lock in its folder, so that no two processes write into one."""

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

    The file holds process id and host, and stays as the mark that the run was started. The lock itself is POSIX's: it
    ends with the process, is not inherited by the workers of a data loader, and holds between machines on NFS. Where
    there are no such locks, one is stale if its process is gone from this host; another host's is removed by hand.
    """

    def __init__(self, folder: str | os.PathLike):
        self.file = Path(folder) / LOCK_FILE
        self._handle: int | None = None

    @property
    def started(self) -> bool:
        return self.file.exists()

    def acquire(self, new: bool) -> bool:
        """Takes the lock, and returns whether it is held now; if `new`, only of a run that nobody has started."""
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
        owner = self._owner()
        return f"process {owner['pid']} on {owner['host']}" if owner else "another process"

    def _owner(self) -> dict | None:
        try:
            return json.loads(self.file.read_text())
        except (OSError, ValueError):
            return None

    def _lock(self, handle: int) -> bool:
        if fcntl is not None:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
        owner = self._owner()
        return owner is None or (owner["host"] == socket.gethostname() and not psutil.pid_exists(owner["pid"]))
