"""Whether paths still lead to the files that were opened by them.

The kernel and SQLite go on with a file that was moved, replaced, unlinked or unmounted, and nothing
tells so. What is written to it, nobody finds again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

# Nothing is there that could be opened
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether the path, its links followed, leads to the open file.

    Raises:
        OSError: the disk does not say.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError as error:
        if error.errno in GONE:
            return False
        raise


class Opened:
    """Files and folders as they were when they were taken hold of.

    Each is held open, so that its inode number is not given to another file. The descriptor is good
    for nothing else (O_PATH): to close one that reads would end SQLite's own locks on the file.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}

    def hold(self, path: Path) -> None:
        """Take hold of what the path leads to, unless it is held already.

        Raises:
            OSError: it leads nowhere.
        """
        if path not in self._held:
            self._held[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)

    def release(self, path: Path) -> None:
        """Let go of it."""
        if (descriptor := self._held.pop(path, None)) is not None:
            os.close(descriptor)

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
        for path, descriptor in self._held.items():
            if not leads_to(path, descriptor):
                return path
        return None
