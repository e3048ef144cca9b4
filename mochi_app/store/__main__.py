"""`python -m mochi_app.store check | backup | restore`: look at a history, copy it, mend it.

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
import sys
from collections.abc import Sequence
from pathlib import Path

from mochi_app.errors import HistoryError
from mochi_app.settings import SettingsError, load_settings
from mochi_app.store.backups import list_backups, make_backup
from mochi_app.store.checks import Sentinel
from mochi_app.store.job_index import JobIndex
from mochi_app.store.lock import LOCK_NAME, locked_by
from mochi_app.store.restore import Restored, inspect, inspect_backup, restore, video_ids


def check(data_dir: Path) -> bool:
    """Print what is in the data folder; whether all of it is sound."""
    history, files = data_dir / "history", video_ids(data_dir)
    holder = locked_by(data_dir / LOCK_NAME)
    report(f"{data_dir}: " + (f"process {holder} serves it" if holder else "no server runs on it"))
    good = True
    try:
        # The sentinel first: while a server runs, the database may be ahead of it, never behind.
        meta, index = inspect(history, Sentinel.read(history))
        report(f"history: sound, {tally(index)}, {meta.get('writes', 0)} changes")
        good = report_orphans(files, index)
    except HistoryError as error:
        good = False
        report(f"history: {error}")
    for backup in list_backups(data_dir):
        try:
            found = tally(inspect_backup(backup.path))
            report(f"backup {backup.path.name}: sound, {found}, {backup.writes} changes")
        except HistoryError as error:
            good = False
            report(f"backup {backup.path.name}: {error}")
    if not list_backups(data_dir):
        report("backups: none")
    return good


def tally(index: JobIndex) -> str:
    """How many jobs there are, by status."""
    counted = [f"{count} {status}" for status, count in index.counts().items() if count]
    counted += [f"{len(trash)} in the trash"] if (trash := index.trashed()) else []
    return f"{len(index)} jobs" + (f" ({', '.join(counted)})" if counted else "")


def report_orphans(files: Sequence[str], index: JobIndex) -> bool:
    """Print videos without a record; whether there are none."""
    orphans = sorted(job_id for job_id in files if index.get(job_id) is None)
    if orphans:
        report(
            f"videos: {len(orphans)} without a record, first {orphans[0]}; to adopt them, stop the"
            " server and run: python -m mochi_app.store restore"
        )
    return not orphans


# The command


def report(line: str) -> None:
    """Print one line for people."""
    sys.stdout.write(line + "\n")


def counted(count: int, one: str, many: str) -> str:
    """`1 job` or `2 jobs`."""
    return f"{count} {one if count == 1 else many}"


def report_restored(done: Restored) -> None:
    """Print what a restore did."""
    followed = done.followed
    source = done.source or "the videos alone"
    report(f"restored from {source}: {counted(done.jobs, 'job', 'jobs')}")
    if followed.adopted:
        report(f"adopted {counted(followed.adopted, 'video', 'videos')} that it did not know")
    if followed.ended:
        waited = counted(followed.ended, "job", "jobs")
        report(f"{waited} that waited had their video: not run again")
    if followed.gone:
        report(f"{counted(followed.gone, 'job has', 'jobs have')} no video any more: now evicted")
    for name in followed.strange:
        report(f"left in place without a record: {name}")
    report(f"what stood there before is in {done.aside}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mochi_app.store",
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
    """Run one command; returns the exit status described above."""
    given = parse(arguments)
    try:
        data_dir = given.data_dir or load_settings().data_dir
        match given.command:
            case "check":
                return 0 if check(data_dir) else 1
            case "backup":
                made = make_backup(data_dir)
                report(f"{made.path}: sound, {made.writes} changes")
            case "restore":
                report_restored(restore(data_dir, given.backup))
    except (SettingsError, HistoryError, OSError) as error:
        sys.stderr.write(f"cannot {given.command}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
