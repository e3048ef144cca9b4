"""What a sound history looks like: sentinel, checksums, and what is wrong with one that is not."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
import orjson

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job
from mochi_app.request import safe_repr
from mochi_app.store.job_index import JobIndex, RequestKey

DATABASE, SENTINEL = diskcache.core.DBNAME, "store.json"
JOB, REQUEST, META = "job:", "request:", "meta"
JOB_END = "job;"  # ";" comes after ":"
SCHEMA = 1  # of the rows; a `meta` that names none has this one
SENTINEL_BYTES = 256  # fixed length: overwritten in place, which needs no free space

Record = dict[str, Any]
Rows = dict[str, Record | str | None]  # None deletes

RESTORE = "restore a backup of it: python -m mochi_app.store restore"
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


class RecordDisk(diskcache.Disk):  # type: ignore[misc]
    """Text keys and JSON text values, in the database only. Nothing is ever unpickled."""

    def put(self, key: Any) -> tuple[str, bool]:
        """The key in its stored form."""
        if not isinstance(key, str):
            raise TypeError(f"history keys are texts, got {safe_repr(key)}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """The key as it was given to `put`."""
        if not raw or not isinstance(key, str):
            raise HistoryError(f"history row {safe_repr(key)} has no text key: {RESTORE}")
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
            HistoryError: `store` wrote no such row; the value was not parsed.
        """
        plain = mode == diskcache.core.MODE_RAW and filename is None and isinstance(value, str)
        if not plain or read:
            raise HistoryError(
                f"history row of mode {safe_repr(mode)} was not written by this app and was not "
                f"read: {RESTORE}"
            )
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise HistoryError(f"history row is no JSON ({error}): {RESTORE}") from error


def request_row(key: RequestKey) -> str:
    """Key of the row for (owner, request_id); JSON, so that no two pairs share one."""
    return REQUEST + orjson.dumps(key).decode()


def check_nothing_left(data_dir: Path, path: Path) -> None:
    """Make sure that a folder without a history never had one.

    Raises:
        HistoryError: it has videos.
    """
    if any((data_dir / "videos").glob("*.mp4")) or any((data_dir / "withheld").glob("*.mp4")):
        raise HistoryError(
            f"{path} is missing, and there are videos: to bring back a backup, or at least what the"
            f" videos tell of themselves: python -m mochi_app.store restore; {BEGIN}"
        )


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For building many long-lived objects: halves the time, as none is traversed repeatedly."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def explained(what: str, recover: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn errors of disk and database into `HistoryError`, after `recover`: what could not be
    done, what the disk reported, what to do."""
    try:
        yield
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        recover()
        cause: BaseException = error
        while isinstance(cause.__context__, sqlite3.Error | OSError):
            cause = cause.__context__  # diskcache hides the first error behind its own
        reason = str(cause) or "database is locked"
        advice = [do for found, do in ADVICE.items() if found in reason.lower()]
        raise HistoryError(
            f"cannot {what}: {reason}; "
            f"{advice[0] if advice else 'check the disk and the permissions of the folder'}"
        ) from error


@dataclass(frozen=True, slots=True)
class Sentinel:
    """The content of `store.json`: identity, jobs at the last start or end, changes ever made, and
    whether a server that has not begun to stop is serving the folder."""

    store: str | None = None
    jobs: int | None = None
    writes: int = 0
    serving: bool = False

    @classmethod
    def read(cls, folder: Path) -> Sentinel | None:
        """The sentinel of a history's folder: an empty one if damaged, None if there is none."""
        try:
            record = orjson.loads((folder / SENTINEL).read_bytes())
            store, jobs, writes = record["store"], record.get("jobs"), record.get("writes", 0)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()
        good = isinstance(store, str) and isinstance(jobs, int | None) and isinstance(writes, int)
        return cls(store, jobs, writes, record.get("serving") is True) if good else cls()

    def content(self) -> bytes:
        """The file's content, always of the same length."""
        record = {
            "store": self.store,
            "jobs": self.jobs,
            "writes": self.writes,
            "serving": self.serving,
        }
        return orjson.dumps(record).ljust(SENTINEL_BYTES) + b"\n"


def checksum(key: str, value: str) -> int:
    """A row's checksum, kept in its `tag`: SQLite itself does not notice a changed byte."""
    return zlib.crc32(value.encode(), zlib.crc32(key.encode()))


def check_pages(database: sqlite3.Connection, path: Path) -> None:
    """Check that the file's structure is sound.

    Raises:
        HistoryError: it is not; the message has what SQLite found.
    """
    found = [" ".join(line.split()) for (line,) in database.execute("PRAGMA quick_check(5)")]
    if found != ["ok"]:
        raise HistoryError(f"{path} is damaged ({'; '.join(found)}): {RESTORE}")


def check_counts(database: sqlite3.Connection, path: Path) -> None:
    """Check that no row is missing from table or index, as after a stale page.

    Raises:
        HistoryError: one is.
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
    """Whether this is a history rather than an empty database."""
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
            raise HistoryError(f"history row {safe_repr(key)} was changed on the disk: {RESTORE}")
        yield name, content


def read_meta(database: sqlite3.Connection, folder: Path) -> Record:
    """Identity of the store and its count of changes; {} when it has none.

    Raises:
        HistoryError: the row is not as it was written, or tells of a later version.
    """
    meta = dict(read_rows(database, folder, "key = ?", META)).get(META)
    if not isinstance(meta, dict) or not isinstance(meta.get("store"), str):
        return {}
    schema = meta.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise HistoryError(
            f"history of schema {safe_repr(schema)}: this version reads up to {SCHEMA}; use the"
            f" version that wrote it, or {RESTORE}"
        )
    return meta


def uptime_of(meta: Record) -> float:
    """The last recorded uptime; 0 when there is none."""
    uptime = meta.get("uptime")
    return float(uptime) if isinstance(uptime, int | float) else 0.0


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
        HistoryError: it is not a job, or one of a later version.
    """
    try:
        if not isinstance(record, dict) or JOB + str(record.get("id")) != key:
            raise ValueError("it is no record of that job")
        return Job.from_record(record)
    except ValueError as error:
        raise HistoryError(
            f"history row {safe_repr(key)} cannot be read: {error}; use the version that wrote "
            f"it, or {RESTORE}"
        ) from error


def check_whole(meta: Record, sentinel: Sentinel | None, path: Path) -> None:
    """Check that a database with this `meta` is the folder's own, with all of its changes.

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
            f" more: python -m mochi_app.store restore"
        )
