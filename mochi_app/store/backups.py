"""Backups of the history: made while the server runs, checked, rotated.

A backup is one SQLite file in `backups/`, named by when it was made, by the beginning of the
store's identity, and by how many changes the store had seen: `history-<UTC>-<store>-<changes>.db`.
It is there whole and checked, or not at all; of several processes one at a time makes one.
`Backups` makes one every so many hours; how one is put in place again is told in `restore.py`.
Every function here blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor

from mochi_app.errors import HistoryError, without_folders
from mochi_app.files import fsync
from mochi_app.store.checks import (
    DATABASE,
    Sentinel,
    check_counts,
    check_pages,
    check_whole,
    explained,
    has_tables,
    read_meta,
)
from mochi_app.store.database import BUSY_SECONDS

log = logging.getLogger(__name__)

FOLDER = "backups"
NAME = re.compile(r"history-(\d{8}T\d{6})Z-([0-9a-f]{8})-(\d+)\.db")
TIME_FORMAT = "%Y%m%dT%H%M%S"
TEMPORARY = "tmp-backup.db"  # what a killed process leaves of it is removed by the next backup
LOCK_SECONDS = 0.1  # between looks whether another process has made its backup
PAGES_PER_STEP = 1000  # 4 MB; between steps a copy can be called off
SPARE_BYTES = 64 << 20  # that a backup leaves free
CHECK_SECONDS = 60.0  # between looks at whether one is due
RETRY_SECONDS = 600.0  # after a failure


class CalledOff(Exception):
    """The server stops, and the copy with it."""


@dataclass(frozen=True, slots=True)
class Backup:
    """One file: when it was made (Unix seconds), of which store, after how many changes."""

    path: Path
    made_at: float
    store: str  # the first 8 digits
    writes: int


def list_backups(data_dir: Path, store: str | None = None) -> list[Backup]:
    """The backups of a store (any when None), the one with the most changes first.

    Not by the clock, which may have been set back.
    """
    found = []
    for path in (data_dir / FOLDER).glob("history-*.db"):
        if match := NAME.fullmatch(path.name):
            with contextlib.suppress(ValueError):  # no such day: not ours
                made = datetime.strptime(match[1], TIME_FORMAT).replace(tzinfo=UTC)
                found.append(Backup(path, made.timestamp(), match[2], int(match[3])))
    wanted = [item for item in found if store is None or store.startswith(item.store)]
    return sorted(wanted, key=lambda backup: (backup.writes, backup.made_at), reverse=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing, with one state of the database to read, whatever is
    written meanwhile.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    # A database closed well has no -wal; opened as immutable, none is left behind either.
    left_open = path.with_name(path.name + "-wal").exists()
    uri = f"{path.resolve().as_uri()}?mode=ro{'' if left_open else '&immutable=1'}"
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    ) as database:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        yield database


def copy_database(
    source: sqlite3.Connection, target: Path, called_off: Callable[[], bool] = lambda: False
) -> None:
    """Write what `source` sees into a file of its own at `target`, durable on return.

    Raises:
        CalledOff: `called_off()` was true between two steps.
        sqlite3.Error, OSError: the disk refuses.
    """

    def look(_status: int, _left: int, _total: int) -> None:
        if called_off():
            raise CalledOff

    target.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
        source.backup(copy, pages=PAGES_PER_STEP, progress=look)
        copy.execute("PRAGMA journal_mode=DELETE").fetchone()  # else it would need two more files
    fsync(target)


def own(path: Path, like: Path) -> None:
    """Give `path` the owner of `like`, so that what root made can be used by the server."""
    if os.geteuid() == 0:
        status = like.stat()
        os.chown(path, status.st_uid, status.st_gid)


def make_backup(data_dir: Path, called_off: Callable[[], bool] = lambda: False) -> Backup:
    """Copy the history as it is now, while a server writes to it or not, and check the copy; after
    another process that makes one.

    Raises:
        HistoryError: no backup was made; the message says why and what to do.
        CalledOff: `called_off()` was true in the middle.
    """
    folder, history = data_dir / FOLDER, data_dir / "history"
    with explained(f"back up the history in {history}"):
        if not (history / DATABASE).exists():
            raise HistoryError(f"{history / DATABASE}: there is no history to back up")
        folder.mkdir(exist_ok=True)
        own(folder, history)
        with only_one(folder, called_off):
            require_space(history, folder)
            return copy_and_keep(history, folder / TEMPORARY, called_off)


@contextlib.contextmanager
def only_one(folder: Path, called_off: Callable[[], bool]) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; wait while another backup is made.

    Raises:
        CalledOff: `called_off()` was true meanwhile.
        OSError: the folder cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while not lock_descriptor(descriptor, blocking=False):
            if called_off():
                raise CalledOff
            time.sleep(LOCK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def copy_and_keep(history: Path, temporary: Path, called_off: Callable[[], bool]) -> Backup:
    """Copy the database in `history` by way of `temporary`, which is gone in the end."""
    try:
        sentinel = Sentinel.read(history)  # before the database, which may be ahead of it
        with reading(history / DATABASE) as source:
            copy_database(source, temporary, called_off)
        return keep(temporary, sentinel, history)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def keep(temporary: Path, sentinel: Sentinel | None, history: Path) -> Backup:
    """Check a copy of the database in `history` and give it its name.

    Raises:
        HistoryError: it is not sound, and neither is what it was made of.
    """
    with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as copy:
        check_pages(copy, history / DATABASE)
        meta = read_meta(copy, history) if has_tables(copy) else {}
        check_whole(meta, sentinel or Sentinel(), history / DATABASE)
        check_counts(copy, history / DATABASE)
    now = time.time()
    stamp = datetime.fromtimestamp(now, UTC).strftime(TIME_FORMAT)
    writes = int(meta.get("writes", 0))
    path = temporary.with_name(f"history-{stamp}Z-{meta['store'][:8]}-{writes}.db")
    own(temporary, history)
    os.replace(temporary, path)
    fsync(path.parent)
    return Backup(path, now, meta["store"][:8], writes)


def require_space(history: Path, folder: Path) -> None:
    """Whether a copy fits.

    Raises:
        HistoryError: it does not.
    """
    files = [path for path in history.glob(f"{DATABASE}*") if path.is_file()]
    needed = sum(path.stat().st_size for path in files) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HistoryError(
            f"the disk has {free / 2**20:.0f} MiB free,"
            f" {needed / 2**20:.0f} MiB are needed; free some disk space"
        )


def rotate(data_dir: Path, store: str, kept: int) -> list[Path]:
    """Remove all but the `kept` newest backups of a store; those that were removed."""
    gone = [backup.path for backup in list_backups(data_dir, store)[kept:]]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


class Backups:
    """Makes a backup every so many hours, on a thread with a connection of its own.

    Used on one event loop. A failure is logged and kept in `problem` until a backup succeeds.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        hours: float,
        kept: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.problem: str | None = None
        self._clock = clock
        self._seen: tuple[Path, float] | None = None  # the newest, and when it was made
        self._data_dir = data_dir
        self._hours = hours
        self._kept = kept
        self._task: asyncio.Task[None] | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to make backups; with 0 hours, do nothing."""
        if self._hours:
            self._task = asyncio.create_task(self._keep_making(), name="backups")

    async def stop(self) -> None:
        """Call off what is being made."""
        self._stopping.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_making(self) -> None:
        while True:
            making = asyncio.create_task(asyncio.to_thread(self._make_due))
            try:
                await asyncio.shield(making)
                self.problem = None
            except asyncio.CancelledError:
                await asyncio.gather(making, return_exceptions=True)
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, it is tried again
                problem = f"no backup was made: {str(error) or type(error).__name__}"
                if without_folders(problem) != self.problem:
                    log.warning("%s", problem)
                self.problem = without_folders(problem)
            await asyncio.sleep(RETRY_SECONDS if self.problem else CHECK_SECONDS)

    def _make_due(self) -> None:
        """Make one if the newest is old enough and lacks something."""
        sentinel = Sentinel.read(self._data_dir / "history") or Sentinel()
        newest = next(iter(list_backups(self._data_dir, sentinel.store)), None)
        if newest is not None and self._age(newest) < self._hours * 3600:
            return
        if sentinel.writes <= (newest.writes if newest else 0):
            return
        with contextlib.suppress(CalledOff):
            made = make_backup(self._data_dir, self._stopping.is_set)
            gone = rotate(self._data_dir, made.store, self._kept)
            self._seen = made.path, self._clock()
            log.info("history backed up to %s; %d older ones removed", made.path.name, len(gone))

    def _age(self, newest: Backup) -> float:
        """Seconds since the newest backup was made, by a clock that nobody sets; by the wall clock
        where it was there before this server. One of the future may be of any age."""
        if self._seen is None:
            age = time.time() - newest.made_at
            self._seen = newest.path, self._clock() - (age if age >= 0 else math.inf)
        elif self._seen[0] != newest.path:  # by hand, meanwhile
            self._seen = newest.path, self._clock()
        return self._clock() - self._seen[1]
