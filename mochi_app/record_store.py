"""The disk under the history: JSON rows in diskcache, checked at start, one server a data folder.

Rows are JSON text under text keys: `job:<id>` is the record, `request:["<owner>","<request_id>"]`
the id of the job that a request made, `meta` the identity of the store. `history/store.json` names
the same identity, so that a lost, emptied or swapped database is noticed and never taken for an
empty history. What the rows mean to the rest of the app is told in `history.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
import orjson

from mochi_app.job_index import JobIndex, RequestKey
from mochi_app.jobs import Job, shown

LOCK_NAME = "server.lock"
DATABASE, SENTINEL = diskcache.core.DBNAME, "store.json"
JOB, REQUEST, META = "job:", "request:", "meta"
JOB_END = "job;"  # ";" comes after ":"
BUSY_SECONDS = 5.0  # patience with another program that holds the database
NO_LIMIT = 2**62

Record = dict[str, Any]
Rows = dict[str, Record | str | None]  # None deletes

ADVICE = {
    "full": "free some disk space",
    "disk i/o": "check the disk, its free space and the mount",
    "readonly": "make the folder and its files writable for this user",
    "unable to open": "make the folder and its files readable and writable for this user",
    "locked": "close the other program that has the database open",
    "malformed": "restore a backup of it",
    "not a database": "restore a backup of it",
}


class HistoryError(RuntimeError):
    """The store cannot be used. The message says what was found and what to do."""


class HistoryLocked(HistoryError):
    """Another process, `pid` when known, serves this data folder."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{path.parent} is in use by {holder}: one server a data folder; "
            f"stop that one or set MOCHI_DATA_DIR to another folder"
        )
        self.pid = pid


class RecordDisk(diskcache.Disk):  # type: ignore[misc]
    """Text keys and JSON text values, in the database only. Nothing is ever unpickled."""

    def put(self, key: Any) -> tuple[str, bool]:
        """The key as it is stored."""
        if not isinstance(key, str):
            raise TypeError(f"history keys are texts, got {shown(key)}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """The key as it was given to `put`."""
        if not raw or not isinstance(key, str):
            raise HistoryError(f"history row {shown(key)} has no text key: {ADVICE['malformed']}")
        return key

    def store(
        self, value: Any, read: bool, key: Any = diskcache.UNKNOWN
    ) -> tuple[int, int, None, str]:
        """The value as JSON text, whatever its size."""
        if read:
            raise TypeError("history values are records, not files")
        return 0, diskcache.core.MODE_RAW, None, orjson.dumps(value).decode()

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """The value of a row that `store` wrote.

        Raises:
            HistoryError: it wrote no such row; the value was not looked at.
        """
        plain = mode == diskcache.core.MODE_RAW and filename is None and isinstance(value, str)
        if not plain or read:
            raise HistoryError(
                f"history row of mode {shown(mode)} was not written by this app and was not "
                f"read: {ADVICE['malformed']}"
            )
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise HistoryError(
                f"history row is no JSON ({error}): {ADVICE['malformed']}"
            ) from error


def request_row(key: RequestKey) -> str:
    """Key of the row that (owner, request_id) has; JSON, so that no two pairs share one."""
    return REQUEST + orjson.dumps(key).decode()


def take_lock(path: Path) -> int:
    """Lock `path` for the life of this process and write its pid there; the open descriptor.

    Raises:
        HistoryLocked: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For building many objects that stay: halves the time, as nothing is walked over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class RecordStore:
    """The database of one data folder, and its lock. Every method blocks; one thread uses it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / "history"
        self._lock: int | None = None
        self._cache: Any = None
        self.meta: Record = {}

    def open(self) -> JobIndex:
        """Lock, check, read everything.

        Raises:
            HistoryLocked, HistoryError: the store cannot be used, and was left as it is.
        """
        try:
            with self._explained("open"):
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
                    sqlite_synchronous=2,  # FULL: a commit is on the disk, power loss or not
                    sqlite_mmap_size=0,  # an unreadable page is an error, not a SIGBUS
                )
                self.write({META: self.meta})
                self._write_sentinel(len(index))
                return index
        except BaseException:
            self._release()
            raise

    def close(self, jobs: int | None = None) -> None:
        """Close the database and give the lock back. `jobs` is how many records there are."""
        if self._cache is not None and jobs is not None:
            with contextlib.suppress(OSError):
                self._write_sentinel(jobs)
        self._release()

    def write(self, rows: Rows) -> None:
        """Write these rows, or none of them; None deletes.

        Raises:
            HistoryError: none was written, as far as the disk tells (see `read`).
        """
        with self._explained("write to"), self._cache.transact(retry=False):
            for key, value in rows.items():
                if value is None:
                    self._cache.delete(key, retry=False)
                else:
                    self._cache.set(key, value, retry=False)

    def read(self, job_ids: list[str]) -> dict[str, Job | None]:
        """What the disk holds for these ids."""
        with self._explained("read"):
            records = {job_id: self._cache.get(JOB + job_id, retry=False) for job_id in job_ids}
            return {key: record and Job.from_record(record) for key, record in records.items()}

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn errors of disk and database into `HistoryError`, with the connection usable."""
        try:
            yield
        except (sqlite3.Error, diskcache.Timeout, OSError) as error:
            self._reset()
            cause: BaseException = error
            while isinstance(cause.__context__, sqlite3.Error | OSError):
                cause = cause.__context__  # diskcache hides the first error behind its own
            said = str(cause) or "database is locked"
            advice = [do for found, do in ADVICE.items() if found in said.lower()]
            raise HistoryError(
                f"cannot {what} the history in {self._folder}: {said}; "
                f"{advice[0] if advice else 'check the disk and the permissions of the folder'}"
            ) from error

    def _reset(self) -> None:
        """Leave a failed transaction: a new connection if the present one is stuck in it."""
        if self._cache is None:
            return
        try:
            with self._cache.transact(retry=False):
                pass
        except (sqlite3.Error, diskcache.Timeout):
            with contextlib.suppress(sqlite3.Error):
                self._cache.close()

    def _release(self) -> None:
        if self._cache is not None:
            with contextlib.suppress(sqlite3.Error):
                self._cache.close()
            self._cache = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def _load(self) -> JobIndex:
        """Check the database before diskcache opens it, then read every job."""
        path = self._folder / DATABASE
        if not path.exists():
            self._identify({})
            return JobIndex()
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        ) as database:
            self._check(database)
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not {"Cache", "Settings"} <= tables:
                self._identify({})
                return JobIndex()
            self._identify(dict(self._rows(database, "key = ?", META)).get(META) or {})
            jobs = self._rows(database, "key >= ? AND key < ?", JOB, JOB_END)
            with garbage_collection_paused():
                index = JobIndex(self._job(key, record) for key, record in jobs)
        index.last_id = max(index.last_id or "", self.meta.get("last_id") or "") or None
        return index

    def _check(self, database: sqlite3.Connection) -> None:
        """Whether the file is sound and can be written."""
        found = [" ".join(said.split()) for (said,) in database.execute("PRAGMA quick_check(5)")]
        if found != ["ok"]:
            raise HistoryError(
                f"{self._folder / DATABASE} is damaged ({'; '.join(found)}): {ADVICE['malformed']}"
            )
        database.execute("BEGIN IMMEDIATE")  # read-only, or held by another program: say so now
        database.execute("ROLLBACK")

    def _rows(
        self, database: sqlite3.Connection, which: str, *keys: str
    ) -> Iterator[tuple[str, Any]]:
        """Keys and values of the rows that the SQL condition `which` selects, by key."""
        disk = RecordDisk(str(self._folder))
        select = f"SELECT key, raw, mode, filename, value FROM Cache WHERE {which} ORDER BY key"
        for key, raw, mode, filename, value in database.execute(select, keys):
            yield disk.get(key, raw), disk.fetch(mode, filename, value, False)

    def _identify(self, meta: Record) -> None:
        """Refuse a database that is not the one this folder had; name a new one."""
        sentinel = self._read_sentinel()
        if sentinel is not None and (
            not meta or sentinel.get("store") not in (None, meta["store"])
        ):
            raise HistoryError(
                f"{self._folder / DATABASE} is missing, empty, or not the history that was here "
                f"(of {sentinel.get('jobs', 'some')} jobs): restore a backup of it, or move "
                f"{self._folder} away to begin an empty history"
            )
        self.meta = meta or {"store": secrets.token_hex(16), "last_id": None}

    def _read_sentinel(self) -> Record | None:
        """What store.json says; {} when it is damaged, None when it is not there."""
        try:
            said = orjson.loads((self._folder / SENTINEL).read_bytes())
        except FileNotFoundError:
            return None
        except orjson.JSONDecodeError:
            return {}
        return said if isinstance(said, dict) else {}

    def _job(self, key: str, record: Any) -> Job:
        try:
            if not isinstance(record, dict) or JOB + str(record.get("id")) != key:
                raise ValueError("it is no record of that job")
            return Job.from_record(record)
        except ValueError as error:
            raise HistoryError(
                f"history row {shown(key)} cannot be read: {error}; use the version that wrote "
                f"it, or restore a backup"
            ) from error

    def _write_sentinel(self, jobs: int) -> None:
        content = orjson.dumps({"store": self.meta["store"], "jobs": jobs})
        replace_file(self._folder / SENTINEL, content)
