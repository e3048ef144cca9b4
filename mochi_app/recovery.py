"""`python -m mochi_app.history check | backup | restore`: look at a history, copy it, mend it.

check    what stands in the data folder, in plain words; changes nothing, also beside a server.
backup   a backup now, also beside a server.
restore  put the best sound copy in place: a backup, or what is left of the history itself, which
         ever has seen more changes; or the one that is named. What it replaces is kept aside. Then
         the record follows the videos: one that the copy does not know is adopted with what its
         MP4 tells, and a job that has its video is not run again. Where there is no copy at all,
         or `videos` is named as the copy, the history begins anew with the videos alone.

Exit status: 0 all is well, 1 `check` found something wrong, 2 it could not be done.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from mochi_app.backups import (
    FOLDER,
    TIME_FORMAT,
    Backup,
    copy_database,
    list_backups,
    make_backup,
    own,
    reading,
)
from mochi_app.files import fsync
from mochi_app.job_index import JobIndex
from mochi_app.jobs import (
    MAX_GUIDANCE_SCALE,
    MAX_LORA_SCALE,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STEPS,
    MIN_SIDE,
    MIN_STEPS,
    Job,
    JobStatus,
    RequestError,
    number,
    parse_job_id,
    shown,
    text,
    walkable,
    whole,
)
from mochi_app.media import VIDEO_SUFFIX, MediaError, MediaStore, read_metadata, video_sizes
from mochi_app.record_store import (
    DATABASE,
    JOB,
    LOCK_NAME,
    SENTINEL,
    HistoryError,
    Record,
    RecordStore,
    Rows,
    Sentinel,
    check_pages,
    check_whole,
    explained,
    has_tables,
    locked_by,
    read_jobs,
    read_meta,
    replace_file,
    take_lock,
)
from mochi_app.settings import SettingsError, load_settings

WORK = "restoring"  # below backups/: where the new history is made ready
MAX_SIDE, MAX_FRAMES, MAX_FPS = 8192, 10_000, 240  # sanity of what a file says of itself
VIDEOS_ALONE = Path("videos")
WAITING = (JobStatus.CREATED, JobStatus.PENDING, JobStatus.PROCESSING)


# Looking


def look(history: Path, sentinel: Sentinel | None) -> tuple[Record, JobIndex]:
    """Identity and jobs of the database in this folder, which is whole and sound.

    Raises:
        HistoryError: it is not.
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


def look_at_backup(path: Path) -> JobIndex:
    """The jobs of a backup, which is sound.

    Raises:
        HistoryError: it is not.
    """
    with explained(f"read {path}"), reading(path) as database:
        check_pages(database, path)
        if not has_tables(database) or not read_meta(database, path.parent):
            raise HistoryError(f"{path} is no backup of a history")
        return read_jobs(database, path.parent)


def check(data_dir: Path) -> bool:
    """Say what stands in the data folder; whether all of it is well."""
    history, files = data_dir / "history", video_ids(data_dir)
    holder = locked_by(data_dir / LOCK_NAME)
    say(f"{data_dir}: " + (f"process {holder} serves it" if holder else "no server runs on it"))
    good = True
    try:
        # The sentinel first: beside a server the database may be ahead of it, never behind.
        meta, index = look(history, Sentinel.read(history))
        say(f"history: sound, {tally(index)}, {meta.get('writes', 0)} changes")
        good = say_strays(files, index)
    except HistoryError as error:
        good = False
        say(f"history: {error}")
    for backup in list_backups(data_dir):
        try:
            found = tally(look_at_backup(backup.path))
            say(f"backup {backup.path.name}: sound, {found}, {backup.writes} changes")
        except HistoryError as error:
            good = False
            say(f"backup {backup.path.name}: {error}")
    if not list_backups(data_dir):
        say("backups: none")
    return good


def tally(index: JobIndex) -> str:
    """How many jobs there are, by status."""
    counted = [f"{count} {status}" for status, count in index.counts().items() if count]
    counted += [f"{len(trash)} in the trash"] if (trash := index.trashed()) else []
    return f"{len(index)} jobs" + (f" ({', '.join(counted)})" if counted else "")


def video_ids(data_dir: Path) -> list[str]:
    """Ids of all jobs that have a video, withheld or not."""
    folders = [data_dir / name for name in ("videos", "withheld")]
    return [job_id for folder in folders if folder.is_dir() for job_id in video_sizes(folder)]


def say_strays(files: Sequence[str], index: JobIndex) -> bool:
    """Tell of videos without a record; whether there are none."""
    strays = sorted(job_id for job_id in files if index.get(job_id) is None)
    if strays:
        say(
            f"videos: {len(strays)} without a record, first {strays[0]}; to adopt them, stop the"
            " server and run: python -m mochi_app.history restore"
        )
    return not strays


# Mending


@dataclass(slots=True)
class Followed:
    """How the records followed the videos."""

    adopted: int = 0  # videos that had no record
    ended: int = 0  # jobs that waited on paper and have their video
    gone: int = 0  # jobs whose video is gone
    strange: list[str] = field(default_factory=list)  # videos that tell too little of themselves


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: from which file, with how many jobs; where the replaced files are."""

    source: Path | None  # None: the videos alone
    jobs: int
    aside: Path
    followed: Followed


def restore(data_dir: Path, chosen: Path | None = None) -> Restored:
    """Put a sound copy of the history in place and let it follow the videos.

    Nothing is removed: what stood in place is moved to a folder of its own below `backups/`. A
    crash at any moment leaves a folder that refuses to start until this is done again.

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
    """`meta` with a count of changes above all that this store has had, also in its backups."""
    seen = [backup.writes for backup in list_backups(data_dir, meta["store"])]
    if sentinel is not None and sentinel.store == meta["store"]:
        seen.append(sentinel.writes)
    return meta | {"writes": max([meta.get("writes", 0), *seen]) + 1}


def in_one_file(path: Path) -> Path:
    """Have everything that was committed in the database's own file.

    Raises:
        HistoryError: some of it stays in its -wal.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        if database.execute("PRAGMA journal_mode=DELETE").fetchone() != ("delete",):
            raise HistoryError(f"{path} could not be finished: run this again")
    return path


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Keep servers off the folder meanwhile."""
    descriptor = take_lock(data_dir / LOCK_NAME)
    try:
        own(data_dir / LOCK_NAME, data_dir)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def candidates(data_dir: Path, sentinel: Sentinel | None, chosen: Path | None) -> list[Path]:
    """The files to try, the best first; none when the videos are all there is.

    Raises:
        HistoryError: there is nothing to restore.
    """
    if chosen == VIDEOS_ALONE:
        return []
    if chosen is not None:
        named = data_dir / FOLDER / chosen.name
        found = chosen if chosen.is_file() else named
        if not found.is_file():
            raise HistoryError(f"{shown(str(chosen))}: there is no such file, nor in {FOLDER}/")
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
    """Those of the store that was backed up last."""
    last = max(backups, key=lambda backup: backup.made_at, default=None)
    return [backup for backup in backups if last is not None and backup.store == last.store]


def ready_copy(paths: Sequence[Path], work: Path) -> tuple[Path | None, RecordStore, JobIndex]:
    """The first of these files that is sound, as an open store of its own in `work`; without files
    an empty one.

    Raises:
        HistoryError: none is; the message says what is wrong with each.
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
        f" tell: python -m mochi_app.history restore {VIDEOS_ALONE}"
    )


def put_in_place(ready: Path, history: Path, said: Sentinel) -> Path:
    """Move what is in the way aside, then the finished database in, then its sentinel.

    Without its -wal a database is refused, and a missing one as well as long as there is a
    sentinel: so a crash in the middle is never taken for a history, least of all an empty one.
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


def follow_videos(media: MediaStore, index: JobIndex) -> tuple[Rows, Followed]:
    """What must change in the records so that they tell of the videos that are there."""
    followed = Followed()
    present, withheld = set(media.job_ids()), set(media.withheld_ids())
    changed: list[Job] = []
    for job_id in sorted(present | withheld):
        path = (media.videos if job_id in present else media.withheld) / (job_id + VIDEO_SUFFIX)
        try:
            job = followed_job(job_id, path, index.get(job_id), followed)
        except (MediaError, RequestError) as error:
            followed.strange.append(f"{path.name} ({error})")
            continue
        if job_id in present:
            job = replace(job, deleted_at=None, deleted_uptime=None)
        elif job.deleted_at is None:
            job = replace(job, deleted_at=time.time(), deleted_uptime=None)
        if job != index.get(job_id):
            poster = media.poster_path(job_id)
            changed.append(replace(job, video=path.name, poster=poster.name if poster else None))
    for job in index:
        if job.video and job.evicted_at is None and job.id not in present | withheld:
            changed.append(replace(job, evicted_at=time.time()))
            followed.gone += 1
    return {JOB + job.id: job.to_record() for job in changed}, followed


def followed_job(job_id: str, path: Path, job: Job | None, followed: Followed) -> Job:
    """The job whose video is at `path`, as its record should be.

    Raises:
        MediaError, RequestError: there is no record, and the video does not tell one.
    """
    made_at = path.stat().st_mtime
    if job is None:
        job = rebuilt(job_id, read_metadata(path), made_at)
        followed.adopted += 1
    elif job.status in WAITING:
        job = finished(job, made_at)
        followed.ended += 1
    return job


def finished(job: Job, at: float) -> Job:
    """A job that waited when the copy was made and was done since."""
    return replace(
        job,
        status=JobStatus.COMPLETED,
        completed_processing_at=at,
        attempts=max(1, job.attempts),
        server_deaths=0,
        suspect=False,
        held=None,
    )


def rebuilt(job_id: str, metadata: Record, at: float) -> Job:
    """The COMPLETED job that a video tells of itself; `at` is when it was made, Unix seconds.

    Owner, request_id, star and note are not in a video and are lost.

    Raises:
        RequestError: it tells too little, or what no job of this app has.
    """
    if metadata.get("job_id") != job_id:
        raise RequestError(f"it is the video of job {shown(metadata.get('job_id'))}")
    kind, parent, lora = (metadata.get(name) for name in ("kind", "parent_id", "lora"))
    if kind not in ("preview", "enhance"):
        raise RequestError(f"kind: got {shown(kind)}, expected preview or enhance")

    def count(name: str, least: int, most: int) -> int:
        return whole(name, metadata.get(name), least=least, most=most)

    def words(name: str, least: int = 0) -> str:
        return text(name, metadata.get(name, ""), least=least, most=MAX_PROMPT_CHARS)

    steps = count("num_inference_steps", MIN_STEPS, MAX_STEPS)
    return Job(
        id=job_id,
        kind=kind,
        parent_id=None if parent is None else parse_job_id(parent),
        prompt=words("prompt", least=1),
        negative_prompt=words("negative_prompt"),
        seed=count("seed", 0, MAX_SEED),
        num_inference_steps=steps,
        guidance_scale=number(
            "guidance_scale", metadata.get("guidance_scale"), least=0, most=MAX_GUIDANCE_SCALE
        ),
        height=count("height", MIN_SIDE, MAX_SIDE),
        width=count("width", MIN_SIDE, MAX_SIDE),
        num_frames=count("num_frames", 1, MAX_FRAMES),
        fps=count("fps", 1, MAX_FPS),
        schedule=walkable(metadata.get("schedule"), steps),
        lora=None if lora is None else words("lora", least=1),
        lora_scale=number("lora_scale", metadata.get("lora_scale"), least=0, most=MAX_LORA_SCALE),
        submitted_at=int(job_id[:14], 16) / 1e6,  # ids begin with the microsecond they were drawn
        status=JobStatus.COMPLETED,
        completed_processing_at=at,
        attempts=1,
        model=words("model"),
    )


# The command


def say(line: str) -> None:
    """One line for people."""
    sys.stdout.write(line + "\n")


def counted(count: int, one: str, many: str) -> str:
    """`1 job` or `2 jobs`."""
    return f"{count} {one if count == 1 else many}"


def tell(done: Restored) -> None:
    """Say what a restore did."""
    followed = done.followed
    say(f"restored from {done.source or 'the videos alone'}: {counted(done.jobs, 'job', 'jobs')}")
    if followed.adopted:
        say(f"adopted {counted(followed.adopted, 'video', 'videos')} that it did not know")
    if followed.ended:
        say(f"{counted(followed.ended, 'job', 'jobs')} that waited had their video: not run again")
    if followed.gone:
        say(f"{counted(followed.gone, 'job has', 'jobs have')} no video any more: now evicted")
    for name in followed.strange:
        say(f"left in place without a record: {name}")
    say(f"what stood there before is in {done.aside}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mochi_app.history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "backup", "restore"):
        command = commands.add_parser(name)
        command.add_argument("--data-dir", type=Path, help="default: MOCHI_DATA_DIR")
        if name == "restore":
            command.add_argument(
                "backup", nargs="?", type=Path, help="a file, a name in backups/, or: videos"
            )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is told at the top."""
    given = parse(arguments)
    try:
        data_dir = given.data_dir or load_settings().data_dir
        match given.command:
            case "check":
                return 0 if check(data_dir) else 1
            case "backup":
                made = make_backup(data_dir)
                say(f"{made.path}: sound, {made.writes} changes")
            case "restore":
                tell(restore(data_dir, given.backup))
    except (SettingsError, HistoryError, OSError) as error:
        sys.stderr.write(f"cannot {given.command}: {error}\n")
        return 2
    return 0
