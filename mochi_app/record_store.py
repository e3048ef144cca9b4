"""The disk under the history: JSON rows in diskcache, checked at start, one server a data folder.

Rows are JSON text under text keys: `job:<id>` is the record, `request:["<owner>","<request_id>"]`
the id of the job that a request made, `meta` the identity of the store and the number of changes
ever made to it. `history/store.json`, the sentinel, names the same identity and, behind each
commit, the same number: a lost, emptied or swapped database is never taken for an empty history,
and one that lacks its newest changes (its `cache.db-wal` was lost) is not taken for a whole one.
Each row carries a checksum. What the rows mean to the rest of the app is told in `history.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
import orjson

from mochi_app.files import fsync, sync
from mochi_app.job_index import JobIndex, RequestKey
from mochi_app.jobs import Job, shown
from mochi_app.opened import Opened, leads_to
from mochi_app.store_errors import reason_of

log = logging.getLogger(__name__)

LOCK_NAME = "server.lock"
DATABASE, SENTINEL = diskcache.core.DBNAME, "store.json"
JOB, REQUEST, META = "job:", "request:", "meta"
JOB_END = "job;"  # ";" comes after ":"
BUSY_SECONDS = 5.0  # patience with another program that holds the database
NO_LIMIT = 2**62
LOCK_TRIES, LOCK_PAUSE_SECONDS = 3, 0.05
SENTINEL_BYTES = 256  # of fixed length: overwritten in place, which takes no space
CHECKPOINT_SECONDS = 60.0  # how much of the history a lost cache.db-wal can cost

Record = dict[str, Any]
Rows = dict[str, Record | str | None]  # None deletes

RESTORE = "restore a backup of it: python -m mochi_app.history restore"
BEGIN = "or set MOCHI_DATA_DIR to another folder to begin an empty history"
ADVICE = {
    "full": "free some disk space",
    "no space": "free some disk space",
    "disk i/o": "check the disk, its free space and the mount",
    "readonly": "make the folder and its files writable for this user",
    "read-only": "make the folder and its files writable for this user",
    "not permitted": "make the folder and its files writable for this user",
    "unable to open": "make the folder and its files readable and writable for this user",
    "locked": "close the other program that has the database open",
    "malformed": RESTORE,
    "not a database": RESTORE,
    "utf-8": RESTORE,
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
            raise HistoryError(f"history row {shown(key)} has no text key: {RESTORE}")
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
                f"read: {RESTORE}"
            )
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise HistoryError(f"history row is no JSON ({error}): {RESTORE}") from error


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


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)


def check_nothing_left(data_dir: Path, path: Path) -> None:
    """Whether a folder without a history never had one.

    Raises:
        HistoryError: it has videos.
    """
    if any((data_dir / "videos").glob("*.mp4")) or any((data_dir / "withheld").glob("*.mp4")):
        raise HistoryError(
            f"{path} is missing, and there are videos: to bring back a backup, or at least what the"
            f" videos tell of themselves: python -m mochi_app.history restore; {BEGIN}"
        )


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


@contextlib.contextmanager
def explained(what: str, mend: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn errors of disk and database into `HistoryError`, after `mend`: what could not be done,
    what the disk said, what to do."""
    try:
        yield
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        mend()
        cause: BaseException = error
        while isinstance(cause.__context__, sqlite3.Error | OSError):
            cause = cause.__context__  # diskcache hides the first error behind its own
        said = str(cause) or "database is locked"
        advice = [do for found, do in ADVICE.items() if found in said.lower()]
        raise HistoryError(
            f"cannot {what}: {said}; "
            f"{advice[0] if advice else 'check the disk and the permissions of the folder'}"
        ) from error


@dataclass(frozen=True, slots=True)
class Sentinel:
    """What `store.json` says: identity, jobs at the last start or end, changes ever made, whether
    a server serves it that has not begun to end."""

    store: str | None = None
    jobs: int | None = None
    writes: int = 0
    serving: bool = False

    @classmethod
    def read(cls, folder: Path) -> Sentinel | None:
        """That of a history's folder: an empty one when it is damaged, None when there is none."""
        try:
            said = orjson.loads((folder / SENTINEL).read_bytes())
            store, jobs, writes = said["store"], said.get("jobs"), said.get("writes", 0)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()
        good = isinstance(store, str) and isinstance(jobs, int | None) and isinstance(writes, int)
        return cls(store, jobs, writes, said.get("serving") is True) if good else cls()

    def content(self) -> bytes:
        """The file's content, always of one length."""
        said = {
            "store": self.store,
            "jobs": self.jobs,
            "writes": self.writes,
            "serving": self.serving,
        }
        return orjson.dumps(said).ljust(SENTINEL_BYTES) + b"\n"


def checksum(key: str, value: str) -> int:
    """Of a row, kept in its `tag`: SQLite itself does not notice a changed byte of a value."""
    return zlib.crc32(value.encode(), zlib.crc32(key.encode()))


def check_pages(database: sqlite3.Connection, path: Path) -> None:
    """Whether the file's structure is sound.

    Raises:
        HistoryError: it is not; the message tells what SQLite found.
    """
    found = [" ".join(said.split()) for (said,) in database.execute("PRAGMA quick_check(5)")]
    if found != ["ok"]:
        raise HistoryError(f"{path} is damaged ({'; '.join(found)}): {RESTORE}")


def check_counts(database: sqlite3.Connection, path: Path) -> None:
    """Whether no row has gone missing from table or index, as a stale page would make it.

    Raises:
        HistoryError: one has.
    """
    ((kept, stored, indexed),) = database.execute(
        "SELECT (SELECT value FROM Settings WHERE key = 'count'),"
        " (SELECT count(*) FROM Cache NOT INDEXED),"
        " (SELECT count(*) FROM Cache INDEXED BY Cache_key_raw)"
    )
    if not kept == stored == indexed:
        raise HistoryError(
            f"{path} is damaged ({stored} rows and {indexed} in its index, {kept} were written):"
            f" {RESTORE}"
        )


def has_tables(database: sqlite3.Connection) -> bool:
    """Whether this is a history, or nothing yet."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    return {"Cache", "Settings"} <= tables


def read_rows(
    database: sqlite3.Connection, folder: Path, which: str, *keys: str
) -> Iterator[tuple[str, Any]]:
    """Keys and values of the rows that the SQL condition `which` selects, by key.

    Raises:
        HistoryError: a row is not as it was written.
    """
    disk = RecordDisk(str(folder))
    select = f"SELECT key, raw, mode, filename, value, tag FROM Cache WHERE {which} ORDER BY key"
    for key, raw, mode, filename, value, tag in database.execute(select, keys):
        name, content = disk.get(key, raw), disk.fetch(mode, filename, value, False)
        if tag is not None and tag != checksum(name, value):
            raise HistoryError(f"history row {shown(key)} was changed on the disk: {RESTORE}")
        yield name, content


def read_meta(database: sqlite3.Connection, folder: Path) -> Record:
    """Identity of the store and its count of changes; {} when it has none.

    Raises:
        HistoryError: the row is not as it was written.
    """
    meta = dict(read_rows(database, folder, "key = ?", META)).get(META)
    return meta if isinstance(meta, dict) and isinstance(meta.get("store"), str) else {}


def uptime_of(meta: Record) -> float:
    """The uptime that was written down last; 0 when none was."""
    said = meta.get("uptime")
    return float(said) if isinstance(said, int | float) else 0.0


def read_jobs(database: sqlite3.Connection, folder: Path) -> JobIndex:
    """Every job of the store.

    Raises:
        HistoryError: one cannot be read, or some are missing.
    """
    check_counts(database, folder / DATABASE)
    rows = read_rows(database, folder, "key >= ? AND key < ?", JOB, JOB_END)
    with garbage_collection_paused():
        return JobIndex(read_job(key, record) for key, record in rows)


def read_job(key: str, record: Any) -> Job:
    """The job of one row.

    Raises:
        HistoryError: it is none, or of a later version.
    """
    try:
        if not isinstance(record, dict) or JOB + str(record.get("id")) != key:
            raise ValueError("it is no record of that job")
        return Job.from_record(record)
    except ValueError as error:
        raise HistoryError(
            f"history row {shown(key)} cannot be read: {error}; use the version that wrote "
            f"it, or {RESTORE}"
        ) from error


def check_whole(meta: Record, sentinel: Sentinel | None, path: Path) -> None:
    """Whether a database with this `meta` is the folder's own, with all of its changes.

    Raises:
        HistoryError: it is missing, empty, another one, or lacks its newest changes.
    """
    if sentinel is None:
        return
    if not meta or sentinel.store not in (None, meta["store"]):
        jobs = "some" if sentinel.jobs is None else sentinel.jobs
        raise HistoryError(
            f"{path} is missing, empty, or not the history that was here (of {jobs} jobs):"
            f" {RESTORE}; {BEGIN}"
        )
    lacking = sentinel.writes - meta.get("writes", 0)
    if lacking > 0:
        raise HistoryError(
            f"{path} lacks the newest {lacking} changes: its {path.name}-wal is lost or damaged;"
            f" put that file back, or keep what is left and the newest backup's, whichever has"
            f" more: python -m mochi_app.history restore"
        )


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
        self.died = False  # the server before: it had not begun to end
        self.meta: Record = {}

    def open(self) -> JobIndex:
        """Lock, check, read everything.

        Raises:
            HistoryLocked, HistoryError: the store cannot be used, and was left as it is.
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
                    sqlite_synchronous=2,  # FULL: a commit is on the disk, power loss or not
                    sqlite_fullfsync=1,  # on macOS, too
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
        """Close the database and give the lock back. `jobs` is how many records there are."""
        self._serving = False
        if self._cache is not None and jobs is not None:
            self._jobs = jobs
            with contextlib.suppress(HistoryError):
                self.write({META: self.meta})  # its uptime
            self._follow()
        self._release()

    def begin_end(self) -> None:
        """Have it known that this server ends because it was told to, should it be killed before
        it has. From any thread, also in the midst of a write."""
        if self._serving:  # else the file may be about to be closed
            self._serving = False
            self._follow()

    @property
    def uptime(self) -> float:
        """Seconds that servers have had this store open, all of them together; no clock on the
        wall has a part in it. The last ten minutes or so of a killed one may be missing."""
        return self._uptime + self._clock() - self._opened_at

    def write(self, rows: Rows) -> None:
        """Write these rows, or none of them; None deletes.

        Raises:
            HistoryError: none was written, as far as the disk tells (see `read`), or not where the
                next start would look for it.
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
            HistoryError: it does not say.
        """
        self._require_opened()
        with self._explained("read the history"):
            self.meta = self._cache.get(META, retry=False) or self.meta
            records = {job_id: self._cache.get(JOB + job_id, retry=False) for job_id in job_ids}
            return {key: record and Job.from_record(record) for key, record in records.items()}

    def check(self) -> None:
        """See that the next start would find what is open here. A lock file or a sentinel that is
        gone is put back.

        Raises:
            HistoryLocked, HistoryError: it would not: nothing may be written now.
        """
        if self._opened is None:
            return
        self._require_opened()
        with explained(f"look after the history in {self._folder}"):
            self._keep_lock()
            self._keep_sentinel()

    def _require_opened(self) -> None:
        """See that every path leads to the file that is open here.

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
        """Take hold of SQLite's files beside the database, which a new connection makes anew."""
        if self._opened is not None:
            for path in self._logs:
                with contextlib.suppress(FileNotFoundError):
                    self._opened.hold(path)

    def _disconnect(self) -> None:
        """Close the connection; the next use makes another, and its files beside the database."""
        if self._opened is not None:
            for path in self._logs:
                self._opened.release(path)
        with contextlib.suppress(sqlite3.Error):
            self._cache.close()

    def _keep_lock(self) -> None:
        """Hold the lock file that other servers look at.

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
        """Hold the sentinel that the next start looks at. Raises OSError."""
        path = self._folder / SENTINEL
        if self._sentinel is not None:
            if leads_to(path, self._sentinel):
                return
            log.warning("%s was removed or replaced: written again", SENTINEL)
            os.close(self._sentinel)
            self._sentinel = None
        self._begin_sentinel()

    def _explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Turn errors of disk and database into `HistoryError`, with the connection usable."""
        return explained(what, self._reset)

    def _begin_sentinel(self) -> None:
        path = self._folder / SENTINEL
        self._serving = True
        replace_file(path, self._said().content())
        self._sentinel = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def _said(self) -> Sentinel:
        writes = self.meta.get("writes", 0)
        return Sentinel(self.meta["store"], self._jobs, writes, self._serving)

    def _follow(self) -> None:
        """Let the sentinel say what has been committed: after the commit, so that it is never
        ahead of the database. It is not flushed: it outlives the process, and after a power loss
        it lags behind a little, which is no false alarm. A failure has the same effect."""
        said = None
        while self._sentinel is not None and said != self._said():  # it may change meanwhile
            said = self._said()
            with contextlib.suppress(OSError):
                os.pwrite(self._sentinel, said.content(), 0)

    def _checkpoint(self) -> None:
        """Now and then, move what was committed from cache.db-wal into cache.db."""
        if time.monotonic() - self._checkpointed_at < CHECKPOINT_SECONDS:
            return
        self._checkpointed_at = time.monotonic()
        self._save_log()

    def _save_log(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # it is safe where it is, if that is still there
            self._cache._sql("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _reset(self) -> None:
        """Leave a failed transaction: a new connection if the present one is stuck in it.

        Not while the path leads to another database, or to none, which would be made.
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
            database.execute("BEGIN IMMEDIATE")  # read-only, or held by another: say so now
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
        """Take over the identity of the store, or make one for a new store."""
        self.meta = meta or {"store": secrets.token_hex(16), "last_id": None, "writes": 0}
        return JobIndex()
