"""Harms to videos and to the disk they are written to."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app.jobs import JobIds
from mochi_app.store.metadata import (
    dump_ffmetadata,
    parse_ffmetadata,
    read_metadata,
    read_poster_metadata,
)
from tests.crowds import deaf_listener
from tests.faults.harms import LARGE, health, made, submit
from tests.serving import Refusal, Served, poll
from tests.videos import blank_tags

Serve = Callable[..., Served]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The data folder on a disk of its own that takes little more than the app leaves free."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk free."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)
    return filler


def test_a_job_waits_for_room_on_the_disk(small_disk: Path, serve: Serve) -> None:
    """The disk fills up before a job starts: the job waits, page, API and /healthz say why, new
    jobs are refused, and it is made as soon as there is space."""
    served = serve("ok").ready()
    first, second = submit(served, "slow", 40), submit(served, "waits")
    served.running(first["id"])
    filler = fill(small_disk, 100 << 20)
    waiting = poll(lambda: (job := served.job(second["id"]))["waits_for"] and job, "a reason")
    assert waiting["waits_for"].startswith("the disk has ")
    assert served.ended(first["id"])["status"] == "COMPLETED"
    unwell = poll(lambda: (h := health(served)).status_code == 503 and h, "a 503")
    assert "the disk has 1" in unwell.json()["reasons"][0]
    with pytest.raises(Refusal, match="delete videos or free the disk"):
        submit(served, "one more")
    filler.unlink()
    ended = served.ended(second["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    assert health(served).status_code == 200


def test_a_disk_that_fills_up_while_a_video_is_written(small_disk: Path, serve: Serve) -> None:
    """The disk is full when a video is written: the job waits for space and is made again by the
    same processes, and no partial file is left."""
    served = serve("ok").ready()
    pids = served.pids()
    job = submit(served, "slow", 40, **LARGE)
    served.running(job["id"])
    filler = fill(small_disk, 600_000)
    waiting = poll(
        lambda: (view := served.job(job["id"]))["status"] == "PENDING" and view, "a second try"
    )
    assert waiting["error"] == "the disk filled up while its video was written"
    assert waiting["waits_for"].startswith("the disk has ")
    assert not list((small_disk / "scratch").rglob("*.mp4"))
    filler.unlink()
    ended = served.ended(job["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 2)
    assert served.pids() == pids
    assert "No space left on device" in served.log.read_text()


def test_accepted_jobs_cannot_overbook_the_disk(small_disk: Path, serve: Serve) -> None:
    """Many jobs are submitted that fit on the disk one by one, but not together: as many as fit are
    accepted, and all of these are made."""
    served = serve("ok").ready()
    fill(small_disk, (256 << 20) + 3_500_000)  # six times what one of them reserves
    accepted: list[dict[str, Any]] = []
    refusal = ""
    while not refusal and len(accepted) < 20:
        try:
            accepted.append(submit(served, "slow black", 40, **LARGE))
        except Refusal as error:
            refusal = str(error)
    assert "for the jobs before it: delete videos or free the disk" in refusal
    assert 3 <= len(accepted) <= 6
    assert {served.ended(job["id"])["status"] for job in accepted} == {"COMPLETED"}


def test_the_server_dies_between_a_video_and_its_record(serve: Serve, tmp_path: Path) -> None:
    """The server is killed when a video is in place but its record is not written: the next start
    adopts the video, and nothing is made twice."""
    flag = tmp_path / "harm"
    flag.touch()
    served = serve("ok", FAULTS_VIDEO=str(flag)).ready()
    job = submit(served, "a video")
    poll(lambda: served.process.poll() is not None, "the server's end")
    flag.unlink()
    video = served.data_dir / "videos" / f"{job['id']}.mp4"
    written = video.stat().st_mtime_ns
    served.start().ready()
    ended = served.ended(job["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    assert video.stat().st_mtime_ns == written
    assert httpx.get(served.url + ended["video_url"]).content == video.read_bytes()
    assert httpx.get(served.url + ended["poster_url"]).status_code == 200


def test_torn_files_are_swept_and_strangers_kept(serve: Serve) -> None:
    """The server dies while files are half written, and foreign files lie among the videos: the
    next start removes the partial files, and leaves the foreign ones in place without serving
    them."""
    served = serve("ok").ready()
    job = made(served)
    served.kill()
    videos = served.data_dir / "videos"
    orphan = JobIds().draw()
    torn = [
        videos / f"tmp-{orphan}.mp4",
        served.data_dir / "scratch" / "0" / f"tmp-{orphan}.mp4",
        served.data_dir / "posters" / f"tmp-{orphan}.webp",
    ]
    foreign = [videos / "notes.txt", videos / f"{orphan}.mp4"]
    for path in torn + foreign:
        path.write_bytes(b"torn or foreign")
    served.start().ready()
    assert [path.exists() for path in torn] == [False] * 3
    assert [path.read_bytes() for path in foreign] == [b"torn or foreign"] * 2
    assert httpx.get(f"{served.url}/files/{orphan}").status_code == 404
    assert served.job(job["id"])["status"] == "COMPLETED"
    assert "notes.txt" in served.log.read_text()
    assert f"video of job {orphan} has no record" in served.log.read_text()


def test_a_full_quota_spares_what_is_starred(serve: Serve) -> None:
    """The quota is full: the oldest unstarred video makes way for a new one, and when all are
    starred, new jobs are refused."""
    quota = 7 << 19  # bytes: two of these videos, and not one more
    served = serve("ok", MOCHI_QUOTA_GIB=str(quota / 2**30)).ready()
    videos = served.data_dir / "videos"
    kept = made(served, "starred", **LARGE)
    served.call("star_job", job_id=kept["id"])
    others = [made(served, f"number {number}", **LARGE) for number in range(3)]
    assert sum(path.stat().st_size for path in videos.iterdir()) <= quota
    there = [served.job(job["id"])["video_url"] is not None for job in [kept, *others]]
    assert there == [True, False, False, True]
    last = others[-1]["id"]
    served.call("star_job", job_id=last)
    with pytest.raises(Refusal, match="unstar or delete some"):
        submit(served, "one more", **LARGE)
    served.call("star_job", job_id=last, starred=False)
    made(served, "one more", **LARGE)
    assert served.job(last)["evicted_at"] is not None
    assert served.job(kept["id"])["video_url"] is not None


def test_a_video_deleted_while_it_is_watched(serve: Serve) -> None:
    """A video is deleted while somebody watches it: it plays to the end, and the next request gets
    404."""
    served = serve("ok").ready()
    job = made(served, "a large one", **LARGE)
    whole = httpx.get(served.url + job["video_url"]).content
    with deaf_listener(served.port, job["video_url"], 1 << 16) as watcher:
        seen = watcher.recv(1000)
        served.call("delete_job", job_id=job["id"])
        assert httpx.get(served.url + job["video_url"]).status_code == 404
        assert served.call("list_jobs")["total"] == 0
        while len(seen.partition(b"\r\n\r\n")[2]) < len(whole):
            more = watcher.recv(1 << 16)
            assert more, "the stream ended early"
            seen += more
    assert seen.partition(b"\r\n\r\n")[2] == whole


def test_a_request_id_whose_job_is_in_the_trash(serve: Serve) -> None:
    """A job is deleted, and its caller submits it again with the same request_id: refused with the
    id and the call that restores it from the trash; every other call says the same, and that call
    works."""
    served = serve("ok").ready()
    asked = {"prompt": "p", "request_id": "mine", "num_inference_steps": 2}
    job = served.ended(served.call("submit_job", **asked)["id"])
    served.call("delete_job", job_id=job["id"])
    for name in ("submit_job", "generate"):
        with pytest.raises(Refusal, match=f"job {job['id']}, which is in the trash: restore_job"):
            served.call(name, **asked)
    for name in ("get_job_status", "get_output_file", "enhance_job", "cancel_job", "star_job"):
        with pytest.raises(Refusal, match=f"job {job['id']} is in the trash: restore_job"):
            served.call(name, job_id=job["id"])
    answer = httpx.get(served.url + job["video_url"])
    assert answer.status_code == 404
    assert "is in the trash" in answer.json()["detail"]
    for _ in range(2):  # asked twice, as after a lost answer
        assert served.call("restore_job", job_id=job["id"])["deleted_at"] is None
    assert served.call("submit_job", **asked)["video_url"] == job["video_url"]
    assert httpx.get(served.url + job["video_url"]).status_code == 200


def test_a_video_that_vanished(serve: Serve) -> None:
    """Somebody removes a video's file by hand: page and API say that it is missing, also after a
    restart, and the rest of the history is unchanged."""
    served = serve("ok").ready()
    gone, other = made(served), made(served)
    (served.data_dir / "videos" / f"{gone['id']}.mp4").unlink()
    answer = httpx.get(served.url + gone["video_url"])
    assert (answer.status_code, answer.json()["detail"]) == (404, "the file is not here any more")
    for _ in range(2):
        view = served.job(gone["id"])
        assert (view["status"], view["video_missing"], view["video_url"]) == (
            "COMPLETED",
            True,
            None,
        )
        with pytest.raises(Refusal, match="is gone from the disk"):
            served.call("get_output_file", job_id=gone["id"])
        assert httpx.get(served.url + other["video_url"]).status_code == 200
        served.terminate()
        served.start().ready()
    assert "the videos of 1 jobs are gone from the disk" in served.log.read_text()


def test_a_service_blanks_the_tags_of_a_video(serve: Serve) -> None:
    """A chat service blanks the tags of a video: prompt, seed and all parameters are read back from
    a second place in the file."""
    served = serve("ok").ready()
    job = served.ended(served.call("submit_job", prompt="<all> & well", seed=5)["id"])
    path = served.data_dir / "videos" / job["video"]
    told = read_metadata(path)
    blank_tags(path)
    assert "comment" not in parse_ffmetadata(dump_ffmetadata(path))
    assert read_metadata(path) == told
    assert (told["prompt"], told["seed"]) == ("<all> & well", 5)
    assert read_poster_metadata(served.data_dir / "posters" / job["poster"]) == told
