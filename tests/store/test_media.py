"""Media files: their order of steps, their bounds, and metadata read back out of them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mochi_app import files
from mochi_app.engine import encode
from mochi_app.errors import MediaError
from mochi_app.jobs import JobIds
from mochi_app.request import RequestError
from mochi_app.store import media
from mochi_app.store.media import FOLDERS, MediaStore, Swept
from tests.places import ROOT
from tests.videos import FRAMES

IDS = JobIds()


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "data")


def produce(store: MediaStore, job_id: str, slot: int = 0, size: int = 1000) -> tuple[str, str]:
    """What an engine leaves in its scratch folder."""
    scratch = store.scratch(slot)
    (scratch / f"{job_id}.mp4").write_bytes(b"v" * size)
    (scratch / f"{job_id}.webp").write_bytes(b"p" * 10)
    return f"{job_id}.mp4", f"{job_id}.webp"


def finished(store: MediaStore, size: int = 1000) -> str:
    """A job whose files are in place."""
    job_id = IDS.draw()
    store.finalise(job_id, 0, *produce(store, job_id, size=size))
    return job_id


def test_a_new_data_folder_has_all_its_folders(store: MediaStore) -> None:
    assert {path.name for path in store.data_dir.iterdir()} == set(FOLDERS)
    assert store.job_ids() == []
    assert store.total_bytes() == 0
    assert store.free_bytes() > 0


def test_scratch_is_empty_each_time(store: MediaStore) -> None:
    scratch = store.scratch(3)
    assert scratch == store.data_dir / "scratch" / "3"
    (scratch / "folder").mkdir()
    (scratch / "folder" / "left").write_text("over")
    assert list(store.scratch(3).iterdir()) == []


def test_files_are_put_in_place(store: MediaStore) -> None:
    job_id = IDS.draw()
    names = store.finalise(job_id, 2, *produce(store, job_id, slot=2, size=1234))
    assert names == (f"{job_id}.mp4", f"{job_id}.webp")
    assert store.video_path(job_id) == store.videos / names[0]
    assert store.poster_path(job_id) == store.posters / names[1]
    assert store.size(job_id) == store.total_bytes() == 1234
    assert store.job_ids() == [job_id]
    assert list((store.data_dir / "scratch" / "2").iterdir()) == []


def test_the_steps_come_in_the_durable_order(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents, then the poster's name, then the video's: each on the disk before the next."""
    job_id = IDS.draw()
    names = produce(store, job_id)
    steps: list[tuple[str, str]] = []
    replace, fsync = os.replace, files.fsync

    def record_replace(source: Path, target: Path) -> None:
        steps.append(("replace", target.suffix))
        replace(source, target)

    def record_fsync(path: Path) -> None:
        steps.append(("fsync", path.suffix or path.name))
        fsync(path)

    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(media, "fsync", record_fsync)
    store.finalise(job_id, 0, *names)
    assert steps == [
        ("fsync", ".webp"),
        ("fsync", ".mp4"),
        ("replace", ".webp"),
        ("fsync", "posters"),
        ("replace", ".mp4"),
        ("fsync", "videos"),
    ]


def test_a_second_attempt_replaces_the_first(store: MediaStore) -> None:
    job_id = finished(store, size=10)
    store.finalise(job_id, 0, *produce(store, job_id, size=30))
    assert store.total_bytes() == 30


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x.mp4", "a/b.mp4", "/etc/passwd", "missing.mp4", "x\0.mp4", "link"]
)
def test_only_a_bare_name_of_a_file_in_scratch_is_taken(store: MediaStore, name: str) -> None:
    job_id = IDS.draw()
    video, poster = produce(store, job_id)
    (store.data_dir / "scratch" / "x.mp4").write_bytes(b"outside")
    (store.data_dir / "scratch" / "0" / "link").symlink_to("/etc/passwd")
    for names in ((name, poster), (video, name)):
        with pytest.raises(MediaError):
            store.finalise(job_id, 0, *names)
    assert store.video_path(job_id) is None
    assert store.poster_path(job_id) is None


@pytest.mark.parametrize("job_id", ["", "..", "../../etc/passwd", "http://x/y", "a" * 10**6, None])
def test_no_path_is_made_of_a_malformed_job_id(store: MediaStore, job_id: Any) -> None:
    for call in (store.video_path, store.poster_path, store.remove):
        with pytest.raises(RequestError, match="job_id"):
            call(job_id)
    with pytest.raises(RequestError, match="job_id"):
        store.finalise(job_id, 0, "v.mp4", "p.webp")


def test_removing_is_for_good_and_may_be_repeated(store: MediaStore) -> None:
    kept, gone = finished(store), finished(store)
    (store.trash / f"{gone}.mp4").write_bytes(b"video")
    for _ in range(2):
        store.remove(gone)
    assert store.video_path(gone) is None
    assert store.poster_path(gone) is None
    assert store.size(gone) == 0
    assert store.job_ids() == [kept]
    assert not list(store.data_dir.rglob(f"{gone}*"))


def test_videos_are_counted_at_start(store: MediaStore) -> None:
    jobs = [finished(store, size) for size in (1, 20, 300)]
    (store.videos / "notes.txt").write_bytes(b"x" * 5000)
    (store.videos / "tmp-x.mp4").write_bytes(b"x" * 5000)
    again = MediaStore(store.data_dir)
    assert again.total_bytes() == 321
    assert again.job_ids() == jobs
    assert [again.size(job_id) for job_id in jobs] == [1, 20, 300]


def test_a_sweep_removes_what_is_half_done_and_nothing_else(store: MediaStore) -> None:
    job_id, trashed = finished(store), finished(store)
    produce(store, IDS.draw(), slot=1)
    (store.scratch(2) / "deep").mkdir()
    (store.data_dir / "scratch" / "2" / "deep" / "tmp-x.mp4").write_bytes(b"x")
    (store.data_dir / "scratch" / "stray").write_bytes(b"x")
    (store.videos / "tmp-y.mp4").write_bytes(b"x")
    store.move_to_trash(trashed)
    (store.videos / "README.txt").write_text("somebody's own")
    assert store.sweep() == Swept(scratch=4, temporary=1)
    assert store.sweep() == Swept(scratch=0, temporary=0)
    assert store.video_path(job_id) is not None
    assert store.poster_path(job_id) is not None
    assert store.poster_path(trashed) is not None
    assert (store.videos / "README.txt").exists()


def test_a_video_in_the_trash_is_not_served_and_comes_back_whole(store: MediaStore) -> None:
    job_id = finished(store, 20)
    store.move_to_trash(job_id)
    store.move_to_trash(job_id)
    assert store.video_path(job_id) is None
    assert store.job_ids() == []
    assert store.total_bytes() == MediaStore(store.data_dir).total_bytes() == 20
    store.take_from_trash(job_id)
    path = store.video_path(job_id)
    assert path is not None
    assert path.stat().st_size == 20
    store.move_to_trash(job_id)
    store.remove(job_id)
    assert not list(store.trash.iterdir())
    assert store.total_bytes() == 0


def test_what_a_run_left_in_scratch_is_removed_and_nothing_else(store: MediaStore) -> None:
    job_id, other = IDS.draw(), IDS.draw()
    names = produce(store, job_id, size=77)
    assert store.scratch_size(0, names[0]) == 77
    with pytest.raises(MediaError):
        store.scratch_size(0, "../../videos/x.mp4")
    scratch = store.data_dir / "scratch" / "0"
    for name in (f"tmp-{job_id}.mp4", f"tmp-{other}.mp4", "rendezvous-1"):
        (scratch / name).touch()
    store.tidy(0, job_id)
    store.tidy(5, job_id)  # a slot that never ran
    assert sorted(path.name for path in scratch.iterdir()) == ["rendezvous-1", f"tmp-{other}.mp4"]


def test_a_video_that_others_removed_is_noticed_and_counts_no_more(store: MediaStore) -> None:
    job_id = finished(store, size=40)
    path = store.videos / f"{job_id}.mp4"
    path.unlink()
    assert store.has_video(job_id)
    assert store.video_path(job_id) is None
    assert not store.has_video(job_id)
    assert store.total_bytes() == 0
    path.write_bytes(b"back again")
    assert store.video_path(job_id) == path
    assert store.has_video(job_id)
    assert store.total_bytes() == 10


def test_orphans_are_named(store: MediaStore) -> None:
    job_id = finished(store)
    (store.videos / "notes.txt").touch()
    (store.posters / "notes.txt").touch()
    assert store.orphans() == ["notes.txt"]
    assert store.poster_ids() == [job_id]


def test_an_evicted_video_leaves_its_poster(store: MediaStore) -> None:
    job_id = finished(store)
    store.remove_video(job_id)
    assert store.video_path(job_id) is None
    assert store.poster_path(job_id) is not None
    assert store.total_bytes() == 0


def test_the_web_process_needs_no_torch() -> None:
    code = "import sys, mochi_app.store.media; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def test_a_checkpoint_is_timed_removed_and_swept_by_its_job(store: MediaStore) -> None:
    gone, going_on = IDS.draw(), IDS.draw()
    assert store.checkpoint_time(gone) == 0
    store.remove_checkpoint(gone)
    for job_id in (gone, going_on):
        path = store.checkpoint(job_id)
        assert path.parent.parent == store.data_dir / "checkpoints"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (5.25, 5.25))
        assert store.checkpoint_time(job_id) == 5.25
    (store.checkpoints / "stray").touch()
    assert store.sweep_checkpoints({going_on}) == 2
    assert [path.name for path in store.checkpoints.iterdir()] == [going_on]
    store.remove_checkpoint(going_on)
    assert list(store.checkpoints.iterdir()) == []
    with pytest.raises(RequestError):
        store.checkpoint("../videos")


def test_checkpoints_that_cannot_be_had_are_none(store: MediaStore) -> None:
    store.checkpoints.rmdir()
    store.checkpoints.touch()
    job_id = IDS.draw()
    assert store.checkpoint_time(job_id) == 0
    store.remove_checkpoint(job_id)


def test_filing_goes_on_where_it_stopped(store: MediaStore) -> None:
    job_id = IDS.draw()
    names = produce(store, job_id)
    store.videos.rmdir()
    with pytest.raises(FileNotFoundError):
        store.finalise(job_id, 0, *names)
    store.videos.mkdir()
    assert store.finalise(job_id, 0, *names) == names
    assert store.poster_path(job_id) is not None
    assert store.size(job_id) == 1000


def test_a_file_moves_to_another_disk_whole_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "videos" / "target"
    target.parent.mkdir()
    source.write_bytes(b"video")
    replace = os.replace

    def across(one: Path, other: Path) -> None:
        if Path(one).parent != Path(other).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(one, other)

    monkeypatch.setattr(os, "replace", across)
    monkeypatch.setattr(media, "fsync", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "")))
    with pytest.raises(OSError, match=f"Errno {errno.EIO}"):
        media.move(source, target)
    assert (source.exists(), list(target.parent.iterdir())) == (True, [])
    monkeypatch.setattr(media, "fsync", lambda path: None)
    media.move(source, target)
    assert (source.exists(), target.read_bytes()) == (False, b"video")


def test_a_sweep_files_what_was_finished_for_jobs_that_have_no_record_of_it(
    store: MediaStore,
) -> None:
    folder = store.scratch(0)
    jobs = [IDS.draw() for _ in range(3)]
    for job_id in jobs:
        encode.save(FRAMES, folder, job_id, fps=12, prompt="p", metadata={"job_id": job_id})
    os.truncate(folder / f"{jobs[1]}.mp4", 500)
    assert store.sweep(jobs[:2]).filed == 1
    assert store.job_ids() == [jobs[0]]
    assert store.poster_path(jobs[0]) is not None
    assert not folder.exists()
