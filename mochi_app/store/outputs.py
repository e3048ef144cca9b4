"""Whether the folders below the data folder can be used: checked every second.

While one that a video needs cannot, no job is started and finished videos wait (`filing.py`): the
problem is the disk's, not a job's. It ends when a check finds the folder usable again; a folder
that was removed is created again. An error that a check does not see (a failing disk) is remembered
until a file can be written to every folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

from mochi_app.changes import Changes
from mochi_app.disk_errors import reason_of
from mochi_app.errors import HistoryError
from mochi_app.files import sync
from mochi_app.store.history import History
from mochi_app.store.media import FOLDERS, TEMPORARY_PREFIX, MediaStore

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
NEEDED = ("videos", "posters", "scratch")  # and the slots' folders in scratch
VIDEOS = ("videos", "withheld")
PROBE = f"{TEMPORARY_PREFIX}probe"

Places = dict[str, tuple[int, int]]  # device and inode, by the folder's name


class Outputs:
    """The folders of one data folder, and why they cannot be used. Used on one event loop."""

    def __init__(self, media: MediaStore, history: History, changed: Changes, slots: int) -> None:
        self.warnings: list[str] = []  # of folders that no video needs
        self._media = media
        self._history = history
        self._changed = changed
        self._names = (*FOLDERS, *(f"scratch/{slot}" for slot in range(slots)))
        self._folders = {name: media.data_dir / name for name in self._names}
        self._first = self._before = self._places()
        self._looked: str | None = None  # what the last check found
        self._met: str | None = None  # an operation's error since a file could last be written
        self._waiting: dict[str, str] = {}  # why finished videos are not in place, by job id
        self._reported: str | None = None
        self._recounted = False
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str | None:
        """Why no video can be saved now."""
        return self.problem_of_folders or next(iter(self._waiting.values()), None)

    @property
    def problem_of_folders(self) -> str | None:
        """Like `problem`, without the finished videos that wait."""
        return self._looked or self._met

    def start(self) -> None:
        """Start checking."""
        self._task = asyncio.create_task(self._watch(), name="outputs")

    async def stop(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await self.check()
            await asyncio.sleep(CHECK_SECONDS)

    def met(self, reason: str) -> None:
        """A video could not be written, for this reason."""
        self._met = f"a video could not be written: {reason}"
        self._report()

    def wait(self, job_id: str, reason: str) -> None:
        """A finished video waits to be put into place, for this reason, until `filed`."""
        self._waiting[job_id] = f"a finished video cannot be put into place: {reason}"
        self._report()

    def filed(self, job_id: str) -> None:
        """The job's video is no longer waiting."""
        self._waiting.pop(job_id, None)
        self._report()

    async def check(self) -> bool:
        """Check every folder; whether all that a video needs are usable, as far as can be seen.

        Touches nothing while the history is not the one that this server opened: then the folders
        next to it are not, either.
        """
        async with self._looking:
            thorough = self._met is not None or bool(self._waiting)
            met = self._met
            try:
                await self._history.check()
                problems = await asyncio.to_thread(self._find_problems, thorough)
            except HistoryError:
                return False
            except OSError as error:
                problems = {NEEDED[0]: reason_of(error)}
            needed = [name for name in problems if name.split("/")[0] in NEEDED]
            others = [name for name in problems if name not in needed]
            self._looked = describe(needed[0], problems[needed[0]]) if needed else None
            self.warnings = [describe(name, problems[name]) for name in others]
            if thorough and not needed and self._met == met:
                self._met = None
            self._report()
            return not needed

    def _find_problems(self, thorough: bool) -> dict[str, str]:
        """Why folders cannot be used, by name; missing ones are created again."""
        problems = {}
        for name, folder in self._folders.items():
            try:
                if not os.path.lexists(folder):
                    folder.mkdir()
                    log.warning("the folder %s was gone and is made again", name)
                require_usable(folder, self._first.get(name), thorough)
            except OSError as error:
                problems[name] = reason_of(error)
        places = {name: place for name, place in self._places().items() if name not in problems}
        others = any(places.get(name) != self._before.get(name) for name in VIDEOS)
        if others and all(name in places for name in VIDEOS):
            self._media.recount()
            self._recounted = True
        self._before = places
        return problems

    def _places(self) -> Places:
        places = {}
        for name, folder in self._folders.items():
            with contextlib.suppress(OSError):
                found = folder.stat()
                places[name] = found.st_dev, found.st_ino
        return places

    def _report(self) -> None:
        """Log a changed problem and notify the pages."""
        if self._recounted:
            self._recounted = False
            self._changed.beat()
        if self.problem == self._reported:
            return
        if self.problem is None:
            log.info("videos can be kept again")
        else:
            log.error("no job is started: %s", self.problem)
        self._reported = self.problem
        self._changed.beat()


def describe(name: str, reason: str) -> str:
    """What is wrong with a folder, for people."""
    return f"the folder {name} cannot be used: {reason}"


def require_usable(folder: Path, first: tuple[int, int] | None, thorough: bool) -> None:
    """Check that files can be created in the folder and will be found again.

    `first` is the folder's device and inode at the start of the server. `thorough` writes a file
    instead of trusting the system's permission check.

    Raises:
        OSError: they cannot.
    """
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if thorough or not os.access(folder, os.W_OK | os.X_OK):
        try_writing(folder)
    if first is not None and found.st_dev != first[0]:
        raise OSError(
            errno.EXDEV,
            "it is on another disk than when the server started: mount that one again, or restart"
            " the server",
        )


def try_writing(folder: Path) -> None:
    """Write a small file into the folder, sync it and remove it.

    Raises:
        OSError: the disk refuses.
    """
    probe = folder / PROBE
    try:
        with probe.open("wb") as file:
            file.write(b"probe")
            file.flush()
            sync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
