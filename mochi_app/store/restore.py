"""Restore the best sound copy of a history, and make the records match the videos.

A copy is checked as a server would check it; what it replaces is moved aside. The command is
`python -m mochi_app.store restore` (`__main__.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mochi_app.errors import HistoryError
from mochi_app.files import fsync, replace_file
from mochi_app.request import safe_repr
from mochi_app.store.adopt import Followed, follow_videos
from mochi_app.store.backups import (
    FOLDER,
    TIME_FORMAT,
    Backup,
    copy_database,
    list_backups,
    own,
    reading,
)
from mochi_app.store.checks import (
    DATABASE,
    SENTINEL,
    Record,
    Sentinel,
    check_pages,
    check_whole,
    explained,
    has_tables,
    read_jobs,
    read_meta,
)
from mochi_app.store.database import RecordStore
from mochi_app.store.job_index import JobIndex
from mochi_app.store.lock import LOCK_NAME, take_lock
from mochi_app.store.media import MediaStore, video_sizes

WORK = "restoring"  # below backups/: where the new history is prepared
VIDEOS_ALONE = Path("videos")


# Looking


def inspect(history: Path, sentinel: Sentinel | None) -> tuple[Record, JobIndex]:
    """Identity and jobs of the database in this folder.

    Raises:
        HistoryError: it is not complete and sound.
    """
    path = history / DATABASE
    with explained(f"read the history in {history}"):
        if not path.exists():
            check_whole({}, sentinel, path)
            raise HistoryError(f"{path}: there is no history yet")
        with reading(path) as database:
            check_pages(database, path)
            meta = read_meta(database, history) if has_tables(database) else {}
            check_whole(meta, sentinel, path)
            return meta, read_jobs(database, history) if meta else JobIndex()


def inspect_backup(path: Path) -> JobIndex:
    """The jobs of a backup.

    Raises:
        HistoryError: it is not sound.
    """
    with explained(f"read {path}"), reading(path) as database:
        check_pages(database, path)
        if not has_tables(database) or not read_meta(database, path.parent):
            raise HistoryError(f"{path} is no backup of a history")
        return read_jobs(database, path.parent)


def video_ids(data_dir: Path) -> list[str]:
    """Ids of all jobs that have a video, in the trash or not."""
    folders = [data_dir / name for name in ("videos", "withheld")]
    return [job_id for folder in folders if folder.is_dir() for job_id in video_sizes(folder)]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: from which file, with how many jobs; where the replaced files are."""

    source: Path | None  # None: the videos alone
    jobs: int
    aside: Path
    followed: Followed


def restore(data_dir: Path, chosen: Path | None = None) -> Restored:
    """Put a sound copy of the history in place and make it match the videos.

    Nothing is removed: the replaced files are moved to their own folder below `backups/`. After a
    crash at any moment the server refuses to start until this is run again.

    Raises:
        HistoryLocked: a server runs on the folder.
        HistoryError: there is no sound copy, or the disk refuses; nothing was changed.
    """
    if not data_dir.is_dir():
        raise HistoryError(f"{data_dir}: there is no such data folder")
    history, work = data_dir / "history", data_dir / FOLDER / WORK
    with explained(f"restore the history in {history}"), locked(data_dir):
        for folder in (history, work.parent):
            folder.mkdir(exist_ok=True)
        sentinel = Sentinel.read(history)
        try:
            source, store, index = ready_copy(candidates(data_dir, sentinel, chosen), work)
            try:
                rows, followed = follow_videos(MediaStore(data_dir), index)
                store.meta = newer_than_all(store.meta, data_dir, sentinel)
                store.write(rows)
            finally:
                store.close()
            jobs = len(index) + followed.adopted
            said = Sentinel(store.meta["store"], jobs, store.meta["writes"])
            aside = put_in_place(in_one_file(work / "history" / DATABASE), history, said)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Restored(source, jobs, aside, followed)


def newer_than_all(meta: Record, data_dir: Path, sentinel: Sentinel | None) -> Record:
    """`meta` with a count of changes above any that this store has had, including its backups."""
    seen = [backup.writes for backup in list_backups(data_dir, meta["store"])]
    if sentinel is not None and sentinel.store == meta["store"]:
        seen.append(sentinel.writes)
    return meta | {"writes": max([meta.get("writes", 0), *seen]) + 1}


def in_one_file(path: Path) -> Path:
    """Move everything that was committed into the database's own file.

    Raises:
        HistoryError: some of it stays in the -wal.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        if database.execute("PRAGMA journal_mode=DELETE").fetchone() != ("delete",):
            raise HistoryError(f"{path} could not be finished: run this again")
    return path


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock the folder against servers."""
    descriptor = take_lock(data_dir / LOCK_NAME)
    try:
        own(data_dir / LOCK_NAME, data_dir)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def candidates(data_dir: Path, sentinel: Sentinel | None, chosen: Path | None) -> list[Path]:
    """The files to try, the best first; none if there are only videos.

    Raises:
        HistoryError: there is nothing to restore.
    """
    if chosen == VIDEOS_ALONE:
        return []
    if chosen is not None:
        named = data_dir / FOLDER / chosen.name
        found = chosen if chosen.is_file() else named
        if not found.is_file():
            raise HistoryError(f"{safe_repr(str(chosen))}: there is no such file, nor in {FOLDER}/")
        return [found]
    store = sentinel.store if sentinel is not None else None
    ranked: list[tuple[int, Path]] = [
        (backup.writes, backup.path) for backup in of_one_store(list_backups(data_dir, store))
    ]
    in_place = data_dir / "history" / DATABASE
    with (
        contextlib.suppress(HistoryError),
        explained(f"read {in_place}"),
        reading(in_place) as kept,
    ):
        meta = read_meta(kept, in_place.parent) if has_tables(kept) else {}
        if meta and store in (None, meta["store"]):
            ranked.append((meta.get("writes", 0), in_place))
    if not ranked and not video_ids(data_dir):
        raise HistoryError(
            f"{data_dir}: there is neither a readable history, nor a backup of it in {FOLDER}/,"
            " nor a video"
        )
    return [path for _, path in sorted(ranked, key=lambda item: item[0], reverse=True)]


def of_one_store(backups: list[Backup]) -> list[Backup]:
    """The backups of the store that was backed up last."""
    last = max(backups, key=lambda backup: backup.made_at, default=None)
    return [backup for backup in backups if last is not None and backup.store == last.store]


def ready_copy(paths: Sequence[Path], work: Path) -> tuple[Path | None, RecordStore, JobIndex]:
    """Open the first sound file as its own store in `work`; without files an empty one.

    Raises:
        HistoryError: none is sound; the message says what is wrong with each.
    """
    wrong = []
    shutil.rmtree(work, ignore_errors=True)
    if not paths:
        work.mkdir()
        store = RecordStore(work)
        return None, store, store.open()
    for path in paths:
        shutil.rmtree(work, ignore_errors=True)
        (work / "history").mkdir(parents=True)
        store = RecordStore(work)
        try:
            with explained(f"read {path}"), reading(path) as source:
                if not has_tables(source) or not read_meta(source, path.parent):
                    raise HistoryError(f"{path} is no backup of a history")
                copy_database(source, work / "history" / DATABASE)
            return path, store, store.open()
        except HistoryError as error:
            wrong.append(f"{path.name}: {error}")
    raise HistoryError(
        f"no copy of the history is sound: {'; '.join(wrong)}; to begin anew with what the videos"
        f" tell: python -m mochi_app.store restore {VIDEOS_ALONE}"
    )


def put_in_place(ready: Path, history: Path, said: Sentinel) -> Path:
    """Move the old files aside, then the finished database into place, then its sentinel.

    As long as there is a sentinel, a database without its -wal is refused, and so is a missing one:
    after a crash in the middle nothing is taken for a history, least of all an empty one.
    """
    stamp = datetime.now(UTC).strftime(TIME_FORMAT)
    aside = history.parent / FOLDER / f"replaced-{stamp}Z"
    while aside.exists():
        aside = aside.with_name(aside.name + "-again")
    aside.mkdir()
    own(aside, history)
    if not (history / SENTINEL).exists():
        replace_file(history / SENTINEL, Sentinel(said.store, said.jobs, said.writes).content())
    shutil.copy2(history / SENTINEL, aside / SENTINEL)
    for name in (f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal", DATABASE):
        if (history / name).exists():
            os.replace(history / name, aside / name)
    fsync(aside)
    own(ready, history)
    fsync(ready)
    os.replace(ready, history / DATABASE)
    fsync(history)
    replace_file(history / SENTINEL, said.content())
    own(history / SENTINEL, history)
    return aside
