"""Harms to the data folder and to the folders below it, done under a running server."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.harms import health, made, mounted, refused_start, submit, submit_until_refused
from tests.serving import Refusal, Served, poll

Serve = Callable[..., Served]
CHECKPOINTED = 40  # steps of a slow job, 0.05 s each
Mount = Callable[..., None]
HARMS = ("removed", "a file", "read-only", "immutable", "a read-only disk over it", "a loop")


def refused(served: Served, words: str) -> None:
    """A submit is refused in these words, and so is everything else that is to be kept."""
    with pytest.raises(Refusal, match=words):
        submit(served, "refused")
    unwell = health(served)
    assert unwell.status_code == 503
    assert words in " ".join(unwell.json()["reasons"])
    assert httpx.get(f"{served.url}/metrics").status_code == 200


def well(served: Served) -> None:
    poll(lambda: health(served).status_code == 200, "health")


def ids(served: Served) -> set[str]:
    return {job["id"] for job in served.call("list_jobs", page_size=100)["jobs"]}


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def put_back(path: Path, number: int) -> bool:
    """Whether the server has a file of its own at `path`, not the inode `number`."""
    return (
        path.exists()
        and path.stat().st_ino != number
        and path.read_text().strip() not in ("", "another")
    )


def test_the_data_folder_is_moved_away(serve: Serve) -> None:
    """The data folder is moved away while the server runs, with or without an empty one in its
    place: whatever would need saving is refused with the reason, nothing is written to the empty
    folder, and once the original is back the server recovers and what was finished meanwhile is
    saved."""
    served = serve("ok").ready()
    data, away = served.data_dir, served.data_dir.with_name("away")
    kept = made(served)
    known = {kept["id"]}
    for replaced in (True, False):
        job = submit(served, "slow", CHECKPOINTED)
        known.add(job["id"])
        served.running(job["id"])
        data.rename(away)
        if replaced:
            data.mkdir()
        poll(lambda: health(served).status_code == 503, "a 503 before anything is asked for")
        refused(served, "the data folder is not the one")
        for name in ("enhance_job", "star_job", "delete_job"):
            with pytest.raises(Refusal, match="the data folder is not the one"):
                served.call(name, job_id=kept["id"])
        finished = f"scratch/0/{job['id']}.mp4"
        poll((away / finished).exists, "the finished video")
        assert served.job(job["id"])["status"] == "PROCESSING"
        served.waits(job["id"], "data folder")
        if replaced:
            assert is_empty(data)
            data.rmdir()
        away.rename(data)
        ended = served.ended(job["id"])
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
        assert ended["hashes"]["frames"]
        assert httpx.get(served.url + ended["video_url"]).status_code == 200
        well(served)
    known.add(made(served)["id"])
    served.kill()
    served.start()
    assert ids(served) == known


@pytest.fixture
def mount() -> Iterator[Mount]:
    """`mount(*arguments, folder)`, as the program of that name; undone after the test."""
    folders: list[Path] = []

    def do(*arguments: str | Path) -> None:
        mounted(*arguments)
        folders.append(Path(arguments[-1]))

    yield do
    for folder in reversed(folders):
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_data_folder_is_unmounted(serve: Serve, mount: Mount, tmp_path: Path) -> None:
    """The disk of the data folder is unmounted while the server runs: jobs are refused with the
    reason, nothing is written to the mount point, and once it is mounted again the server
    recovers."""
    data, disk = tmp_path / "data", tmp_path / "disk"
    data.mkdir()
    disk.mkdir()
    mount("--bind", disk, data)
    served = serve("ok").ready()
    job = submit(served, "slow", CHECKPOINTED)
    served.running(job["id"])
    unmount(data)
    refused(served, "the data folder is not the one")
    poll(lambda: (disk / f"scratch/0/{job['id']}.mp4").exists(), "the finished video")
    assert is_empty(data)
    mount("--bind", disk, data)
    assert served.ended(job["id"])["attempts"] == 1
    well(served)
    served.kill()
    served.start()
    assert ids(served) == {job["id"]}
    served.kill()


def test_the_history_is_replaced(serve: Serve) -> None:
    """The folder of the history, its database or its write-ahead log is replaced, removed or
    swapped with another while the server runs: nothing more is accepted, and once it is back the
    server recovers; nothing that was accepted is lost."""
    served = serve("ok").ready()
    known = {made(served)["id"]}
    for name in ("history", "history/cache.db", "history/cache.db-wal"):
        path, away = served.data_dir / name, served.data_dir / "away"
        for replaced in (False, True):
            path.rename(away)
            if replaced and away.is_dir():
                shutil.copytree(away, path)
            elif replaced:
                shutil.copyfile(away, path)
            refused(served, f"{path.name} is not the one")
            if replaced:
                shutil.rmtree(path) if away.is_dir() else path.unlink()
            assert not path.exists()
            away.rename(path)
            well(served)
            known.add(made(served)["id"])
    served.kill()
    served.start()
    assert ids(served) == known


def test_the_write_ahead_log_is_removed(serve: Serve) -> None:
    """The history's write-ahead log is removed for good while the server runs: nothing more is
    accepted, and everything that was accepted is there at the next start, even after SIGKILL."""
    served = serve("ok").ready()
    known = {made(served)["id"] for _ in range(2)}
    (served.data_dir / "history" / "cache.db-wal").unlink()
    refused(served, "cache.db-wal is not the one")
    served.kill()
    served.start().ready()
    assert ids(served) == known
    made(served)


def test_the_lock_file_is_removed(serve: Serve, tmp_path: Path) -> None:
    """The lock file, or the sentinel of the history, is removed or replaced while the server runs:
    the server puts its own back and goes on, and a second server is refused."""
    served = serve("ok").ready()
    known = {made(served)["id"]}
    for name in ("server.lock", "history/store.json"):
        path = served.data_dir / name
        for replaced in (False, True):
            number = path.stat().st_ino
            path.rename(tmp_path / "other")
            if replaced:
                path.write_text("another")
            poll(partial(put_back, path, number), name)
            assert f"in use by process {served.process.pid}:" in refused_start(served.data_dir)
            known.add(made(served)["id"])
    served.kill()
    served.start()
    assert ids(served) == known


def test_a_link_in_place_of_the_data_folder(serve: Serve) -> None:
    """A symbolic link takes the data folder's place: a link to the same folder changes nothing;
    with a link to another folder nothing is accepted, and that folder stays untouched."""
    served = serve("ok").ready()
    data, away, other = (served.data_dir.with_name(name) for name in ("data", "away", "other"))
    data.rename(away)
    data.symlink_to(away)
    known = {poll(lambda: suppressed(lambda: made(served)), "a video")["id"]}
    data.unlink()
    shutil.copytree(away, other)
    data.symlink_to(other)
    before = sorted(path.relative_to(other) for path in other.rglob("*"))
    refused(served, "the data folder is not the one")
    with pytest.raises(Refusal, match="the data folder is not the one"):
        served.call("delete_job", job_id=next(iter(known)))
    assert sorted(path.relative_to(other) for path in other.rglob("*")) == before
    data.unlink()
    away.rename(data)
    well(served)
    assert ids(served) == known


def suppressed(call: Callable[[], Any]) -> Any:
    with contextlib.suppress(Refusal):
        return call()


@contextlib.contextmanager
def harmed(folder: Path, harm: str) -> Iterator[None]:
    """The folder in this state; as it was afterwards, but for what only the server can mend."""
    aside = folder.with_name("aside")
    match harm:
        case "removed":
            shutil.rmtree(folder)
        case "a file" | "a loop":
            folder.rename(aside)
            folder.touch() if harm == "a file" else folder.symlink_to(folder)
        case "read-only":
            mounted("--bind", folder, folder)
            mounted("-o", "remount,bind,ro", folder)
        case "a read-only disk over it":
            mounted("-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", folder)
        case "immutable":
            if subprocess.run(["chattr", "+i", folder], check=False).returncode:
                pytest.skip("this user, or this filesystem, cannot make a folder immutable")
    try:
        yield
    finally:
        match harm:
            case "a file" | "a loop":
                folder.unlink()
                aside.rename(folder)
            case "read-only" | "a read-only disk over it":
                unmount(folder)
            case "immutable":
                subprocess.run(["chattr", "-i", folder], check=True)


@pytest.mark.parametrize("name", ["videos", "posters", "scratch", "scratch/0"])
def test_a_folder_of_outputs_is_unusable(serve: Serve, name: str) -> None:
    """`videos/`, `posters/` or `scratch/` is removed, read-only, immutable, or replaced by
    something else: no job fails and none is started, page, API and /healthz give the reason, a
    finished video is kept and filed later, and the server recovers by itself, recreating a removed
    folder."""
    served = serve("ok").ready()
    folder = served.data_dir / name
    for harm in HARMS:
        running = submit(served, "slow", CHECKPOINTED)
        served.running(running["id"])
        with harmed(folder, harm):
            if harm != "removed":
                reason = poll(
                    lambda: (h := health(served)).status_code == 503 and h.json()["reasons"], harm
                )
                assert name in reason[0], harm
                waiting = submit(served, "waits")
                served.waits(running["id"])
                assert served.job(running["id"])["status"] in ("PROCESSING", "PENDING")
                assert name in served.waits(waiting["id"])
                assert served.job(waiting["id"])["status"] == "PENDING"
                assert httpx.get(f"{served.url}/metrics").status_code == 200
            else:
                waiting = submit(served, "waits")
        for job in (running, waiting):
            ended = served.ended(job["id"])
            assert ended["status"] == "COMPLETED", (harm, ended["error"])
            assert ended["attempts"] <= 2
            assert httpx.get(served.url + ended["video_url"]).status_code == 200
            assert httpx.get(served.url + ended["poster_url"]).status_code == 200
        if name in ("videos", "posters") and harm != "removed":
            assert served.job(running["id"])["attempts"] == 1, harm
        well(served)
    assert [slot["restarts"] for slot in served.slots()] == [0]


def test_a_disk_that_refuses_to_file_a_video(serve: Serve, tmp_path: Path) -> None:
    """The disk refuses a finished video, with any of its errors: the job waits and says why,
    /healthz says so, no other job starts, and the video is filed as soon as the disk accepts it,
    without being made again."""
    flag = tmp_path / "harm"
    served = serve("ok", FAULTS_FILING=str(flag)).ready()
    for number in ("EROFS", "EPERM", "EACCES", "ENOENT", "ENOTDIR", "ESTALE", "EIO", "ELOOP"):
        flag.write_text(number)
        finished, waiting = submit(served, "p"), submit(served, "p")
        reason = os.strerror(getattr(errno, number))
        served.waits(finished["id"], reason)
        assert served.job(finished["id"])["status"] == "PROCESSING"
        assert health(served).status_code == 503
        assert served.job(waiting["id"])["status"] == "PENDING"
        assert served.job(waiting["id"])["waits_for"]
        cancelled = served.call("cancel_job", job_id=waiting["id"])
        assert cancelled["status"] == "CANCELLED"
        flag.unlink()
        ended = served.ended(finished["id"])
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
        well(served)


def test_an_error_of_the_job_itself_still_fails_it(serve: Serve, tmp_path: Path) -> None:
    """A finished video cannot be saved for a reason other than the disk: the job fails and says so,
    and the next one is made."""
    flag = tmp_path / "harm"
    flag.write_text("ENAMETOOLONG")
    served = serve("ok", FAULTS_FILING=str(flag)).ready()
    ended = served.ended(submit(served, "p")["id"])
    assert (ended["status"], ended["attempts"]) == ("FAILED", 1)
    assert "File name too long" in ended["error"]
    flag.unlink()
    made(served)


def test_finished_work_outlives_a_restart(serve: Serve, tmp_path: Path) -> None:
    """The server ends, by SIGTERM or SIGKILL, while a finished video waits to be filed: the next
    start files it without making it again."""
    flag = tmp_path / "harm"
    for end in (Served.terminate, Served.kill):
        flag.write_text("EROFS")
        served = serve("ok", FAULTS_FILING=str(flag)).ready()
        job = submit(served, "p")
        served.waits(job["id"])
        path = served.data_dir / "scratch" / "0" / f"{job['id']}.mp4"
        number = path.stat().st_ino
        end(served)
        flag.unlink()
        served.start()
        ended = served.ended(job["id"])
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
        assert (served.data_dir / "videos" / path.name).stat().st_ino == number
        assert httpx.get(served.url + ended["poster_url"]).status_code == 200
        served.terminate()


def test_a_finished_job_is_cancelled_while_it_waits(serve: Serve, tmp_path: Path) -> None:
    """A job whose finished video waits to be filed is cancelled: it becomes CANCELLED, and none of
    its files remain."""
    flag = tmp_path / "harm"
    flag.write_text("EROFS")
    served = serve("ok", FAULTS_FILING=str(flag)).ready()
    job = submit(served, "p")
    poll(lambda: served.job(job["id"])["waits_for"], "a reason")
    served.call("cancel_job", job_id=job["id"])
    assert served.ended(job["id"])["status"] == "CANCELLED"
    flag.unlink()
    well(served)
    assert not list(served.data_dir.rglob(f"*{job['id']}*"))
    made(served)


def test_folders_that_no_video_needs(serve: Serve) -> None:
    """`checkpoints/`, `withheld/` or `backups/` is removed or unusable: jobs are made all the same,
    a warning in /healthz names the folder, and a delete that is impossible is refused with the
    reason."""
    served = serve("ok").ready()
    for name in ("checkpoints", "withheld", "backups"):
        for harm in HARMS:
            with harmed(served.data_dir / name, harm):
                if harm != "removed":
                    told = poll(lambda: health(served).json()["warnings"], "a warning")
                    assert name in told[0]
                    assert health(served).status_code == 200
                job = made(served, "slow 1")
                if name == "withheld" and harm != "removed":
                    with pytest.raises(Refusal, match="withheld"):
                        served.call("delete_job", job_id=job["id"])
                    assert served.job(job["id"])["video_url"]
            poll(lambda: not health(served).json()["warnings"], "no warning")
            served.call("delete_job", job_id=job["id"])


def test_the_videos_are_on_a_disk_of_their_own(serve: Serve, mount: Mount, tmp_path: Path) -> None:
    """`videos/` is on a disk of its own, which is unmounted while the server runs and mounted
    again: no video is filed to the mount point, and the server recovers when the disk is back."""
    disk, videos = tmp_path / "disk", tmp_path / "data" / "videos"
    disk.mkdir()
    videos.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", disk)
    mount("--bind", disk, videos)
    served = serve("ok").ready()
    before = made(served)
    job = submit(served, "slow", CHECKPOINTED)
    served.running(job["id"])
    unmount(videos)
    poll(lambda: served.job(job["id"])["waits_for"], "a reason")
    assert is_empty(videos)
    assert httpx.get(served.url + before["video_url"]).status_code in (404, 503)
    mount("--bind", disk, videos)
    ended = served.ended(job["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    for view in (before, ended):
        assert httpx.get(f"{served.url}/files/{view['id']}").status_code == 200
    poll(lambda: all(served.job(view["id"])["video_url"] for view in (before, ended)), "the videos")
    served.call("delete_job", job_id=before["id"])
    served.terminate()


def test_nothing_is_lost_when_the_folder_comes_and_goes(serve: Serve) -> None:
    """Jobs are submitted without pause while the data folder is moved away and back: each accepted
    job is known at the next start, and made once."""
    served = serve("ok").ready()
    data, away = served.data_dir, served.data_dir.with_name("away")
    accepted: set[str] = set()
    for _ in range(3):
        data.rename(away)
        data.mkdir()
        taken, _ = submit_until_refused(served)
        accepted.update(taken)
        data.rmdir()
        away.rename(data)
        well(served)
        accepted.add(submit(served, "p")["id"])
    assert os.listdir(data / "history")
    served.kill()
    served.start()
    assert ids(served) == accepted
    assert {served.ended(job_id)["attempts"] for job_id in accepted} == {1}
