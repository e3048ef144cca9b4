"""The slot's scratch folder as a rank holds it: open, so that what is written lands in it.

Should somebody move the data folder away and put another one in its place, the rank goes on in the
folder that it was given, and its video is there when that one is put back.
"""

from __future__ import annotations

import os
from pathlib import Path

from mochi_app.disk_errors import UNUSABLE, said

FOLLOWS = hasattr(os, "O_PATH")  # Linux, whose /proc leads to open folders


class Scratch:
    """The folder at `path`, opened when it is first asked for."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def folder(self) -> Path:
        """A path that leads to the folder wherever it has been moved, for this process and those
        that it starts; on macOS its name. One that was removed is opened, or made, anew.

        Raises:
            OSError: it cannot be.
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
    """Whether nothing leads to the open folder any more, or its disk has forgotten it."""
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:
        return True


def refused(error: Exception, folder: Path) -> bool:
    """Whether an error of writing a video into the folder is the folder's, and no job's."""
    if isinstance(error, OSError):
        ours = error.filename is None or str(error.filename).startswith(str(folder))
        return ours and error.errno in UNUSABLE
    return said(str(error), UNUSABLE)  # ffmpeg, in the system's words
