"""One server a data folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from mochi_app.errors import HistoryError

LOCK_NAME = "server.lock"
LOCK_TRIES, LOCK_PAUSE_SECONDS = 3, 0.05


class HistoryLocked(HistoryError):
    """Another process, `pid` when known, serves this data folder."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{path.parent} is in use by {holder}: one server a data folder; "
            f"stop that one or set MOCHI_DATA_DIR to another folder"
        )
        self.pid = pid


def take_lock(path: Path) -> int:
    """Lock `path` for the life of this process and write its pid there; the open descriptor.

    Raises:
        HistoryLocked: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        flock_soon(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).strip()
        os.close(descriptor)
        raise HistoryLocked(path, int(pid) if pid.isdigit() else None) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def flock_soon(descriptor: int) -> None:
    """Lock it; `locked_by` may hold it for a moment.

    Raises:
        BlockingIOError: somebody else holds it for longer.
    """
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(LOCK_PAUSE_SECONDS)
    raise BlockingIOError


def locked_by(path: Path) -> str | None:
    """The pid in a lock file that somebody holds (`"?"` when it tells none), None when nobody does.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "?"
    finally:
        os.close(descriptor)
    return None
