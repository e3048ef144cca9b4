"""The slot's scratch folder, which a rank holds open so that its files land there.

If the data folder is moved away and replaced by another, the rank continues in the folder that it
was given, and its video is there when that one is put back.
"""

from __future__ import annotations

import os
from pathlib import Path

from mochi_app.disk_errors import UNUSABLE, mentions

FOLLOWS = hasattr(os, "O_PATH")  # Linux, whose /proc leads to open folders


class Scratch:
    """The folder at `path`, opened on first use."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def folder(self) -> Path:
        """A path that leads to the folder wherever it has been moved, for this process and its
        children; on macOS its original path. If it was removed, it is opened, or created, again.

        Raises:
            OSError: it cannot be opened or created.
        """
        if self._descriptor is not None and removed(self._descriptor):
            os.close(self._descriptor)
            self._descriptor = None
        if self._descriptor is None:
            self._descriptor = self._open()
        lasting = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        return lasting if FOLLOWS and lasting.is_dir() else Path(self.path)

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self.path, flags)
        except FileNotFoundError:
            os.mkdir(self.path)  # not its parents: they may be another folder's by now
            return os.open(self.path, flags)


def removed(descriptor: int) -> bool:
    """Whether the open folder has been deleted, or its disk no longer knows it."""
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:
        return True


def refused(error: Exception, folder: Path) -> bool:
    """Whether an error while writing a video is the folder's fault and not the job's."""
    if isinstance(error, OSError):
        ours = error.filename is None or str(error.filename).startswith(str(folder))
        return ours and error.errno in UNUSABLE
    return mentions(str(error), UNUSABLE)  # ffmpeg quotes the system
