"""The storage of the history: JSON rows in diskcache, checked at start, one server per data folder.

Rows are JSON text under text keys: `job:<id>` is the record, `request:["<owner>","<request_id>"]`
the id of the job that a request made, `meta` the identity of the store and the number of changes
ever made to it. `history/store.json`, the sentinel, holds the same identity and, updated after each
commit, the same number: a lost, emptied or swapped database is never taken for an empty history,
and one that lacks its newest changes (its `cache.db-wal` was lost) is not taken for a complete one.
Each row has a checksum. What the rows mean to the rest of the app is described in `history.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diskcache
import orjson

from mochi_app.disk_errors import reason_of
from mochi_app.errors import HistoryError
from mochi_app.files import replace_file, sync
from mochi_app.jobs import Job
from mochi_app.store.checks import (
    DATABASE,
    JOB,
    META,
    SENTINEL,
    Record,
    RecordDisk,
    Rows,
    Sentinel,
    check_nothing_left,
    check_pages,
    check_whole,
    checksum,
    explained,
    has_tables,
    read_jobs,
    read_meta,
    uptime_of,
)
from mochi_app.store.job_index import JobIndex
from mochi_app.store.lock import LOCK_NAME, take_lock
from mochi_app.store.opened import Opened, leads_to

log = logging.getLogger(__name__)
BUSY_SECONDS = 5.0  # to wait for another program that holds the database
NO_LIMIT = 2**62
CHECKPOINT_SECONDS = 60.0  # how much of the history a lost cache.db-wal can cost


class RecordStore:
    """The database of one data folder, and its lock. Every method blocks; one thread uses it."""

    def __init__(self, data_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / "history"
        self._lock: int | None = None
        self._cache: Any = None
        self._sentinel: int | None = None  # open descriptor of store.json
        self._opened: Opened | None = None  # all files of the store, from the end of `open`
        self._jobs = 0  # at the last start or end
        self._checkpointed_at = 0.0
        self._clock = clock
        self._opened_at = 0.0
        self._uptime = 0.0  # when it was opened
        self._serving = False
        self.died = False  # whether the previous server had not begun to stop
        self.meta: Record = {}

    def open(self) -> JobIndex:
        """Lock, check, read everything.

        Raises:
            HistoryLocked, HistoryError: the store cannot be used, and was not changed.
        """
        try:
            with self._explained(f"open the history in {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = take_lock(self._data_dir / LOCK_NAME)
                index = self._load()
                self._cache = diskcache.Cache(
                    str(self._folder),
                    timeout=BUSY_SECONDS,
                    disk=RecordDisk,
                    eviction_policy="none",
                    size_limit=NO_LIMIT,
                    cull_limit=0,
                    statistics=0,
                    tag_index=0,
                    disk_min_file_size=NO_LIMIT,
                    sqlite_synchronous=2,  # FULL: a commit survives a power loss
                    sqlite_fullfsync=1,  # also on macOS
                    sqlite_checkpoint_fullfsync=1,
                    sqlite_mmap_size=0,  # an unreadable page is an error, not a SIGBUS
                )
                self._jobs = len(index)
                self._uptime, self._opened_at = uptime_of(self.meta), self._clock()
                self.write({META: self.meta})
                self._begin_sentinel()
                self._hold()
                return index
        except BaseException:
            self._release()
            raise

    def close(self, jobs: int | None = None) -> None:
        """Close the database and release the lock. `jobs` is how many records there are."""
        self._serving = False
        if self._cache is not None and jobs is not None:
            self._jobs = jobs
            with contextlib.suppress(HistoryError):
                self.write({META: self.meta})  # its uptime
            self._follow()
        self._release()

    def begin_end(self) -> None:
        """Record that this server was asked to stop, in case it is killed before it has. Safe to
        call from any thread, even during a write."""
        if self._serving:  # else the file may be about to be closed
            self._serving = False
            self._follow()

    @property
    def uptime(self) -> float:
        """Total seconds that servers have had this store open, independent of the wall clock. The
        last ten minutes or so of a killed server may be missing."""
        return self._uptime + self._clock() - self._opened_at

    def write(self, rows: Rows) -> None:
        """Write these rows, or none of them; None deletes.

        Raises:
            HistoryError: none was written, as far as the disk reports (see `read`), or not where
                the next start would look for it.
        """
        self.check()
        changes = sum(key.startswith(JOB) for key in rows)
        meta = {**self.meta, **self._meta_of(rows)}
        meta["writes"] = self.meta.get("writes", 0) + changes
        meta["uptime"] = round(self.uptime, 1)
        with self._explained("write to the history"), self._cache.transact(retry=False):
            for key, value in (rows | {META: meta}).items():
                if value is None:
                    self._cache.delete(key, retry=False)
                else:
                    text = orjson.dumps(value).decode()
                    self._cache.set(key, value, retry=False, tag=checksum(key, text))
        self.meta = meta
        self._follow()
        self._hold_log()
        self._checkpoint()
        self._require_opened()

    @staticmethod
    def _meta_of(rows: Rows) -> Record:
        meta = rows.get(META)
        return meta if isinstance(meta, dict) else {}

    def read(self, job_ids: list[str]) -> dict[str, Job | None]:
        """What the disk holds for these ids.

        Raises:
            HistoryError: it cannot be read.
        """
        self._require_opened()
        with self._explained("read the history"):
            self.meta = self._cache.get(META, retry=False) or self.meta
            records = {job_id: self._cache.get(JOB + job_id, retry=False) for job_id in job_ids}
            return {key: record and Job.from_record(record) for key, record in records.items()}

    def check(self) -> None:
        """Check that the next start would find what is open here. A missing lock file or sentinel
        is put back.

        Raises:
            HistoryLocked, HistoryError: it would not; nothing may be written now.
        """
        if self._opened is None:
            return
        self._require_opened()
        with explained(f"look after the history in {self._folder}"):
            self._keep_lock()
            self._keep_sentinel()

    def _require_opened(self) -> None:
        """Check that every path leads to the file that is open here.

        Raises:
            HistoryError: one does not.
        """
        if self._opened is None:
            return
        try:
            path = self._opened.stranger()
        except OSError as error:
            raise HistoryError(
                f"cannot reach the data folder: {reason_of(error)}; check the disk and the mount"
            ) from error
        if path is None:
            return
        if path in self._logs:
            self._save_log()
        what = f"the history's {path.name}" if path.parent == self._folder else "the data folder"
        if path == self._folder:
            what = "the data folder's history"
        raise HistoryError(
            f"{what} is not the one that this server opened: it was moved, removed, replaced or"
            " unmounted; put it back, or restart the server"
        )

    @property
    def _logs(self) -> tuple[Path, ...]:
        return tuple(self._folder / f"{DATABASE}{suffix}" for suffix in ("-wal", "-shm"))

    def _hold(self) -> None:
        self._opened = Opened()
        for path in (self._data_dir, self._folder, self._folder / DATABASE):
            self._opened.hold(path)
        self._hold_log()

    def _hold_log(self) -> None:
        """Hold SQLite's files next to the database, which each new connection creates again."""
        if self._opened is not None:
            for path in self._logs:
                with contextlib.suppress(FileNotFoundError):
                    self._opened.hold(path)

    def _disconnect(self) -> None:
        """Close the connection; the next use opens another and creates its files again."""
        if self._opened is not None:
            for path in self._logs:
                self._opened.release(path)
        with contextlib.suppress(sqlite3.Error):
            self._cache.close()

    def _keep_lock(self) -> None:
        """Make sure that this server holds the lock file that other servers check.

        Raises:
            HistoryLocked, HistoryError: another one holds it, or did.
            OSError: it cannot be locked.
        """
        path = self._data_dir / LOCK_NAME
        assert self._lock is not None
        if leads_to(path, self._lock):
            return
        lock = take_lock(path)
        kept = self._cache.get(META, retry=False)
        if kept != self.meta:
            os.close(lock)
            raise HistoryError(
                "another server wrote to the history while its lock file was gone: restart this one"
            )
        log.warning("%s was removed or replaced: locked again", LOCK_NAME)
        os.close(self._lock)
        self._lock = lock

    def _keep_sentinel(self) -> None:
        """Make sure that the sentinel that the next start reads is open. Raises OSError."""
        path = self._folder / SENTINEL
        if self._sentinel is not None:
            if leads_to(path, self._sentinel):
                return
            log.warning("%s was removed or replaced: written again", SENTINEL)
            os.close(self._sentinel)
            self._sentinel = None
        self._begin_sentinel()

    def _explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Turn errors of disk and database into `HistoryError`; the connection stays usable."""
        return explained(what, self._reset)

    def _begin_sentinel(self) -> None:
        path = self._folder / SENTINEL
        self._serving = True
        replace_file(path, self._sentinel_now().content())
        self._sentinel = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def _sentinel_now(self) -> Sentinel:
        writes = self.meta.get("writes", 0)
        return Sentinel(self.meta["store"], self._jobs, writes, self._serving)

    def _follow(self) -> None:
        """Update the sentinel to what has been committed: after the commit, so that it is never
        ahead of the database. It is not flushed: it outlives the process, and after a power loss
        it lags behind a little, which raises no false alarm. A failure has the same effect."""
        written = None
        while self._sentinel is not None and written != self._sentinel_now():  # it may change
            written = self._sentinel_now()
            with contextlib.suppress(OSError):
                os.pwrite(self._sentinel, written.content(), 0)

    def _checkpoint(self) -> None:
        """From time to time, move what was committed from cache.db-wal into cache.db."""
        if time.monotonic() - self._checkpointed_at < CHECKPOINT_SECONDS:
            return
        self._checkpointed_at = time.monotonic()
        self._save_log()

    def _save_log(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # it is safe in the -wal, if that still exists
            self._cache._sql("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _reset(self) -> None:
        """Leave a failed transaction: reconnect if the connection is stuck in it.

        Not while the path leads to another database, or to none, which would be created.
        """
        if self._cache is None:
            return
        try:
            self._require_opened()
        except HistoryError:
            return
        try:
            with self._cache.transact(retry=False):
                pass
        except (sqlite3.Error, diskcache.Timeout):
            self._disconnect()

    def _release(self) -> None:
        if self._cache is not None:
            self._disconnect()
            self._cache = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._sentinel is not None:
            with contextlib.suppress(OSError):
                sync(self._sentinel)
            os.close(self._sentinel)
            self._sentinel = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def _load(self) -> JobIndex:
        """Check the database before diskcache opens it, then read every job."""
        path = self._folder / DATABASE
        sentinel = Sentinel.read(self._folder)
        self.died = sentinel is not None and sentinel.serving
        if not path.exists():
            check_whole({}, sentinel, path)
            check_nothing_left(self._data_dir, path)
            return self._begin()
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        ) as database:
            check_pages(database, path)
            database.execute("BEGIN IMMEDIATE")  # fail now if read-only, or held by another program
            database.execute("ROLLBACK")
            meta = read_meta(database, self._folder) if has_tables(database) else {}
            check_whole(meta, sentinel, path)
            if not has_tables(database):
                return self._begin()
            index = read_jobs(database, self._folder)
        self._begin(meta)
        index.last_id = max(index.last_id or "", self.meta.get("last_id") or "") or None
        return index

    def _begin(self, meta: Record | None = None) -> JobIndex:
        """Adopt the identity of the store, or create one for a new store."""
        self.meta = meta or {"store": secrets.token_hex(16), "last_id": None, "writes": 0}
        return JobIndex()
