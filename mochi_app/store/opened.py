"""Whether paths still lead to the files that were opened by them.

The kernel and SQLite go on with a file that was moved, replaced, unlinked or unmounted, and nothing
tells so. What is written to it, nobody finds again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

# Opens a path to name its file and no more; Linux has it
NAMING: int | None = os.O_PATH | os.O_CLOEXEC if hasattr(os, "O_PATH") else None
# Nothing is there that could be opened
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def leads_to(path: Path, held: int | os.stat_result) -> bool:
    """Whether the path, its links followed, leads to the file of this descriptor or status.

    Raises:
        OSError: the disk does not say.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(held) if isinstance(held, int) else held)
    except OSError as error:
        if error.errno in GONE:
            return False
        raise


class Opened:
    """Files and folders as they were when they were taken hold of.

    Each is held open, so that its inode number is not given to another file. The descriptor is good
    for nothing else (O_PATH): to close one that reads would end SQLite's own locks on the file.
    Where there is no such descriptor (macOS) the inode's number is remembered.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int | os.stat_result] = {}

    def hold(self, path: Path) -> None:
        """Take hold of what the path leads to, unless it is held already.

        Raises:
            OSError: it leads nowhere.
        """
        if path not in self._held:
            self._held[path] = path.stat() if NAMING is None else os.open(path, NAMING)

    def release(self, path: Path) -> None:
        """Let go of it."""
        if isinstance(held := self._held.pop(path, None), int):
            os.close(held)

    def close(self) -> None:
        """Let go of all."""
        for path in list(self._held):
            with contextlib.suppress(OSError):
                self.release(path)

    def stranger(self) -> Path | None:
        """The first path, in the order in which they were taken, that leads elsewhere by now.

        Raises:
            OSError: the disk does not say.
        """
        for path, held in self._held.items():
            if not leads_to(path, held):
                return path
        return None
