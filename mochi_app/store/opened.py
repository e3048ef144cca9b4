"""Whether paths still lead to the files that were opened through them.

The kernel and SQLite keep using a file that was moved, replaced, unlinked or unmounted, without an
error. What is written to it is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

# Opens a path only to identify its file; Linux only
NAMING: int | None = os.O_PATH | os.O_CLOEXEC if hasattr(os, "O_PATH") else None
# There is nothing to open
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def leads_to(path: Path, held: int | os.stat_result) -> bool:
    """Whether the path, following links, leads to the file of this descriptor or stat result.

    Raises:
        OSError: it cannot be determined.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(held) if isinstance(held, int) else held)
    except OSError as error:
        if error.errno in GONE:
            return False
        raise


class Opened:
    """Files and folders as they were when `hold` was called.

    Each is held open, so that its inode number is not reused for another file. The descriptor is
    good for nothing else (O_PATH): closing a readable one would end SQLite's own locks on the file.
    Without such descriptors (macOS) the inode number is remembered.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int | os.stat_result] = {}

    def hold(self, path: Path) -> None:
        """Hold what the path leads to, unless it is held already.

        Raises:
            OSError: it leads nowhere.
        """
        if path not in self._held:
            self._held[path] = path.stat() if NAMING is None else os.open(path, NAMING)

    def release(self, path: Path) -> None:
        """Release one path."""
        if isinstance(held := self._held.pop(path, None), int):
            os.close(held)

    def close(self) -> None:
        """Release all paths."""
        for path in list(self._held):
            with contextlib.suppress(OSError):
                self.release(path)

    def stranger(self) -> Path | None:
        """The first path, in the order in which they were held, that now leads elsewhere.

        Raises:
            OSError: it cannot be determined.
        """
        for path, held in self._held.items():
            if not leads_to(path, held):
                return path
        return None
