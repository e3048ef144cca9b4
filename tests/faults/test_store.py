"""Harms to the history: its disk, its files, its lock."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.harms import PROGRAM, QUICK, mounted, refused_start, run, submit_until_refused
from tests.serving import Refusal, Served, poll

Serve = Callable[..., Served]


def tool(command: str, data_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`python -m mochi_app.store COMMAND`."""
    return run("-m", "mochi_app.store", command, *more, data_dir=data_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The data folder of `serve`, its history on a disk of 2 MiB."""
    history = tmp_path / "data" / "history"
    history.mkdir(parents=True)
    mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs", history)
    yield tmp_path / "data"
    subprocess.run(["umount", "--lazy", history], check=True)


def fill(data_dir: Path) -> Path:
    """A file that takes the last byte of the history's disk."""
    path = data_dir / "history" / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(path.parent).free == 0
    return path


def videos(data_dir: Path) -> list[str]:
    return sorted(path.stem for path in (data_dir / "videos").glob("*.mp4"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a server that was killed: three jobs, a backup of the first two."""
    data_dir = tmp_path_factory.mktemp("kept") / "data"
    served = Served(data_dir, program=PROGRAM).start().ready()
    try:
        for prompt in ("one", "two"):
            served.ended(served.call("submit_job", prompt=prompt, **QUICK)["id"])
        assert tool("backup", data_dir).returncode == 0
        served.ended(served.call("submit_job", prompt="three", **QUICK)["id"])
        served.kill()
        yield data_dir
    finally:
        served.end()


@pytest.fixture
def harmed(kept: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be harmed; the database whole in its own file."""
    data_dir = tmp_path / "data"
    shutil.copytree(kept, data_dir)
    with contextlib.closing(sqlite3.connect(data_dir / "history" / "cache.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return data_dir


def restored(data_dir: Path, serve: Serve) -> list[dict[str, Any]]:
    """What a server lists once a restore has mended this folder, oldest first."""
    done = tool("restore", data_dir)
    assert done.returncode == 0, done.stderr
    served = serve("ok").ready()
    jobs: list[dict[str, Any]] = served.call("list_jobs")["jobs"][::-1]
    assert {job["attempts"] for job in jobs} == {1}
    for job in jobs:
        assert httpx.get(f"{served.url}{job['video_url']}").status_code == 200
    return jobs


def test_a_full_disk_refuses_jobs_and_loses_none(small_disk: Path, serve: Serve) -> None:
    """The history's disk is full while jobs run and wait: new jobs are refused with the reason, the
    server stays up, and once there is space it recovers by itself; nothing is lost or done
    twice."""
    served = serve("ok").ready()
    running = served.call("submit_job", prompt="slow", num_inference_steps=40)["id"]
    waiting = served.call("submit_job", prompt="waits", **QUICK)["id"]
    served.running(running)
    filler = fill(small_disk)
    taken, refusal = submit_until_refused(served)
    assert "full; free some disk space" in refusal
    poll(lambda: running in videos(small_disk), "the running job's video")
    made = (small_disk / "videos" / f"{running}.mp4").stat()
    health = httpx.get(f"{served.url}/healthz")
    assert health.status_code == 503
    assert "full; free some disk space" in health.text
    assert served.job(running)["status"] == "PROCESSING"
    filler.unlink()
    ended = [served.ended(job_id) for job_id in (running, waiting, *taken)]
    assert {(job["status"], job["attempts"]) for job in ended} == {("COMPLETED", 1)}
    assert ended[0]["hashes"]["frames"]
    assert (small_disk / "videos" / f"{running}.mp4").stat() == made
    poll(lambda: httpx.get(f"{served.url}/healthz").status_code == 200, "health")
    served.kill()
    again = serve("ok")
    assert again.call("list_jobs")["total"] == 2 + len(taken)
    assert served.log.read_text().count("full; free some disk space") < 20


def test_a_start_on_a_full_disk_is_refused_and_harms_nothing(
    small_disk: Path, serve: Serve
) -> None:
    """The server is killed and restarted while its disk is full: it refuses to start with one line
    that says so, and once there is space it continues where it was."""
    served = serve("ok").ready()
    job = served.call("submit_job", prompt="slow", num_inference_steps=100)["id"]
    served.running(job)
    filler = fill(small_disk)
    taken, _ = submit_until_refused(served)
    served.kill()
    assert "free some disk space" in refused_start(small_disk)
    filler.unlink()
    again = serve("ok").ready()
    for job_id in (job, *taken):
        assert again.ended(job_id)["status"] == "COMPLETED"


def test_a_read_only_folder_is_told(harmed: Path, serve: Serve) -> None:
    """The data folder is read-only: the server refuses to start with one line that says so; `check`
    still works."""
    mounted("--bind", harmed, harmed)
    try:
        mounted("-o", "remount,bind,ro", harmed)
        assert "make the folder and its files writable" in refused_start(harmed)
        assert tool("check", harmed).returncode == 0
    finally:
        subprocess.run(["umount", "--lazy", harmed], check=True)
    assert serve("ok").call("list_jobs")["total"] == 3


def test_a_read_only_database_is_told(harmed: Path, serve: Serve) -> None:
    """Only the database is read-only: the server refuses to start with one line that says so."""
    database = harmed / "history" / "cache.db"
    mounted("--bind", database, database)
    try:
        mounted("-o", "remount,bind,ro", database)
        assert "make the folder and its files writable" in refused_start(harmed)
    finally:
        subprocess.run(["umount", "--lazy", database], check=True)
    assert serve("ok").call("list_jobs")["total"] == 3


@contextlib.contextmanager
def held(database: Path) -> Iterator[None]:
    """Another process holds the database for itself."""
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(database)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.kill()


def test_another_program_holds_the_database(serve: Serve, tmp_path: Path) -> None:
    """Another program locks the database of a running server: jobs are refused with the reason, the
    page still answers, and once the lock is released the finished job is recorded, made only
    once."""
    served = serve("ok").ready()
    job = served.call("submit_job", prompt="slow", num_inference_steps=20)["id"]
    served.running(job)
    with held(tmp_path / "data" / "history" / "cache.db"):
        with pytest.raises(Refusal, match="locked; close the other program"):
            served.call("submit_job", prompt="refused")
        poll(lambda: job in videos(tmp_path / "data"), "the video")
        assert served.job(job)["status"] == "PROCESSING"
    ended = served.ended(job)
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    after = served.call("submit_job", prompt="after", **QUICK)["id"]
    assert served.ended(after)["status"] == "COMPLETED"
    assert served.call("list_jobs")["total"] == 2


def test_another_program_holds_the_database_at_the_start(harmed: Path, serve: Serve) -> None:
    """Another program locks the database when the server starts: it refuses to start with one
    line."""
    with held(harmed / "history" / "cache.db"):
        assert "locked; close the other program" in refused_start(harmed)
    assert serve("ok").call("list_jobs")["total"] == 3


def test_a_second_server_is_refused(serve: Serve, tmp_path: Path) -> None:
    """A second server, or a restore, is started on the data folder of a running one: it is refused
    and names the first one's process; `check` and `backup` still work."""
    served = serve("ok").ready()
    job = served.call("submit_job", prompt="slow", num_inference_steps=60)["id"]
    served.running(job)
    data_dir = tmp_path / "data"
    assert f"in use by process {served.process.pid}:" in refused_start(data_dir)
    restore = tool("restore", data_dir)
    assert (restore.returncode, restore.stdout) == (2, "")
    assert f"in use by process {served.process.pid}:" in restore.stderr
    check = tool("check", data_dir)
    assert check.returncode == 0, check.stdout
    assert f"process {served.process.pid} serves it" in check.stdout
    assert tool("backup", data_dir).returncode == 0
    assert served.ended(job)["attempts"] == 1


def test_an_emptied_database(harmed: Path, serve: Serve) -> None:
    """The database is found with zero bytes: never treated as an empty history; the server refuses
    to start and names the restore command, which brings back the backup, and newer jobs from their
    videos."""
    (harmed / "history" / "cache.db").write_bytes(b"")
    said = refused_start(harmed)
    assert "missing, empty, or not the history" in said
    assert "python -m mochi_app.store restore" in said
    assert tool("check", harmed).returncode == 1
    assert [job["prompt"] for job in restored(harmed, serve)] == ["one", "two", "three"]


def test_a_cut_database(harmed: Path) -> None:
    """The database is cut in half: the server refuses to start and names the restore command, which
    keeps the damaged file aside."""
    path = harmed / "history" / "cache.db"
    left = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(left)
    assert "python -m mochi_app.store restore" in refused_start(harmed)
    assert path.read_bytes() == left
    assert tool("restore", harmed).returncode == 0
    (aside,) = (harmed / "backups").glob("replaced-*")
    assert (aside / "cache.db").read_bytes() == left
    assert tool("check", harmed).returncode == 0


def test_garbage_in_the_database(harmed: Path) -> None:
    """Pages in the middle of the database are garbage: the server refuses to start and names the
    restore command, and so does `check`."""
    path = harmed / "history" / "cache.db"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 8192] = os.urandom(8192)
    path.write_bytes(content)
    assert "python -m mochi_app.store restore" in refused_start(harmed)
    assert tool("check", harmed).returncode == 1


def test_a_changed_record(harmed: Path) -> None:
    """One byte of one record has changed in a database that SQLite finds intact: the server refuses
    to start and names the record."""
    path = harmed / "history" / "cache.db"
    content = path.read_bytes()
    assert content.count(b'"prompt":"two"') == 1
    path.write_bytes(content.replace(b'"prompt":"two"', b'"prompt":"tvo"'))
    assert "was changed on the disk" in refused_start(harmed)


def test_a_lost_write_ahead_log(serve: Serve, tmp_path: Path) -> None:
    """A server is killed and its cache.db-wal is lost, but cache.db is intact: never a history that
    silently lacks its newest jobs; the server refuses to start, and a restore adopts these jobs."""
    jobs = []
    for number in range(3):
        served = serve("ok").ready()
        asked = {"prompt": f"number {number}", **QUICK}
        jobs.append(served.ended(served.call("submit_job", **asked)["id"]))
        if number < 2:
            served.terminate()  # what was written by then is in cache.db
    served.kill()
    history = tmp_path / "data" / "history"
    for name in ("cache.db-wal", "cache.db-shm"):
        (history / name).unlink()
    said = refused_start(tmp_path / "data")
    assert "cache.db-wal is lost or damaged" in said
    again = restored(tmp_path / "data", serve)
    assert [job["id"] for job in again] == [job["id"] for job in jobs]


def test_an_old_backup_runs_no_finished_job_again(serve: Serve, tmp_path: Path) -> None:
    """The history is lost and its newest backup dates from when jobs were running and waiting: jobs
    that have a video are adopted, the rest are made, and nothing is made twice."""
    served = serve("ok").ready()
    first = served.call("submit_job", prompt="slow", num_inference_steps=40)["id"]
    second = served.call("submit_job", prompt="waits", **QUICK)["id"]
    third = served.call("submit_job", prompt="slow", num_inference_steps=200)["id"]
    served.running(first)
    data_dir = tmp_path / "data"
    assert tool("backup", data_dir).returncode == 0
    made = {job["id"]: job for job in map(served.ended, (first, second))}
    newest = served.call("submit_job", prompt="newer than the backup", seed=5, **QUICK)["id"]
    served.running(third)
    served.kill()
    files = {name: (data_dir / "videos" / f"{name}.mp4").stat() for name in videos(data_dir)}
    assert set(made) <= set(files)
    (data_dir / "history" / "cache.db").write_bytes(b"garbage!" * 4096)
    assert tool("restore", data_dir).returncode == 0
    again = serve("ok").ready()
    for job_id in (first, second, third):
        ended = again.ended(job_id)
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    seeds = {job["id"]: job["seed"] for job in again.call("list_jobs", query="newer")["jobs"]}
    # it may have overtaken the long one: its video tells of it then, and nothing else does
    assert seeds == dict.fromkeys({newest} & files.keys(), 5)
    for name, file in files.items():
        assert (data_dir / "videos" / f"{name}.mp4").stat() == file


def test_a_backup_that_does_not_fit(small_disk: Path, serve: Serve) -> None:
    """There is no space for a backup: /healthz shows a warning, and the server goes on."""
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", made(small_disk / "backups"))
    try:
        served = serve("ok").ready()
        served.ended(served.call("submit_job", prompt="kept", **QUICK)["id"])
        served.terminate()
        again = serve("ok").ready()  # the first backup is due at the start
        poll(lambda: httpx.get(f"{again.url}/healthz").json()["warnings"], "the warning")
        health = httpx.get(f"{again.url}/healthz")
        assert (health.status_code, health.json()["ok"]) == (200, True)
        assert "free some disk space" in health.json()["warnings"][0]
        job = again.call("submit_job", prompt="still made", **QUICK)["id"]
        assert again.ended(job)["status"] == "COMPLETED"
        again.process.send_signal(signal.SIGTERM)
        again.process.wait(15)
    finally:
        subprocess.run(["umount", "--lazy", small_disk / "backups"], check=True)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
