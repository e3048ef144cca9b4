"""Backups and restores of a history: made beside a writer, checked, rotated, put in place."""

# ruff: noqa: ASYNC240 - a test may hold up its own loop

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mochi_app.engine import encode
from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.store import adopt, backups
from mochi_app.store.__main__ import main
from mochi_app.store.backups import Backups, list_backups, make_backup, rotate
from mochi_app.store.history import History
from mochi_app.store.lock import HistoryLocked
from mochi_app.store.restore import restore
from tests.conftest import eventually
from tests.test_history import completed, job_id, make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def replaced_by(job: Job, _: Job) -> Job:
    return job


def newest_is(data: Path, writes: int) -> bool:
    return [backup.writes for backup in list_backups(data)[:1]] == [writes]


async def keep(data: Path, *jobs: Job) -> None:
    """Write these jobs, new or changed, into the history of `data`, and close it."""
    async with opened(data) as history:
        for job in jobs:
            if history.get(job.id) is None:
                await history.add(job)
            else:
                await history.update(job.id, partial(replaced_by, job))


@contextlib.asynccontextmanager
async def opened(data: Path) -> Any:
    history = await History.open(data)
    try:
        yield history
    finally:
        await history.close()


async def kept(data: Path) -> dict[int, Job]:
    """What a server finds: number and job."""
    async with opened(data) as history:
        return {int(job.id[:14], 16): job for job in history._index}


def video(data: Path, number: int, folder: str = "videos", **metadata: Any) -> Path:
    """A finished video as the engine leaves it, which tells of its job."""
    name = job_id(number)
    facts = {
        "job_id": name,
        "kind": "preview",
        "parent_id": None,
        "prompt": f"video {number}",
        "negative_prompt": "dull",
        "seed": 2**32 - number,
        "num_inference_steps": 8,
        "guidance_scale": 4.5,
        "height": 64,
        "width": 96,
        "num_frames": 7,
        "fps": 12,
        "schedule": "linear_quadratic",
        "lora": None,
        "lora_scale": 1.0,
        "model": "tiny-mochi",
        "version": "1",
    }
    path = data / folder / f"{name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.zeros((7, 64, 96, 3), dtype=np.uint8)
    encode.write_video(frames, path, fps=12, prompt="", metadata=facts | metadata)
    return path


class TestBackups:
    async def test_a_backup_beside_a_writer_is_one_moment_of_it(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backups, "PAGES_PER_STEP", 10)
        async with opened(data) as history:
            await asyncio.gather(*(history.add(make(number)) for number in range(1, 201)))
            loop, steps = asyncio.get_running_loop(), 0

            def write_between_steps() -> bool:
                nonlocal steps
                steps += 1
                change = history.update(
                    job_id(1), lambda job: replace(job, attempts=job.attempts + 1)
                )
                asyncio.run_coroutine_threadsafe(change, loop).result(10)
                return steps > 100  # the copy begins anew with each write, and never ends

            made = await asyncio.to_thread(make_backup, data, write_between_steps)
            assert history.get(job_id(1)).attempts == steps > 1
        with contextlib.closing(sqlite3.connect(made.path)) as copy:
            rows = dict(copy.execute("SELECT key, value FROM Cache").fetchall())
        assert (len(rows), made.writes) == (201, 200)
        assert '"attempts":0,' in rows[f"job:{job_id(1)}"]
        assert sorted(path.name for path in made.path.parent.iterdir()) == [made.path.name]

    async def test_what_lacks_its_newest_changes_is_not_backed_up(self, data: Path) -> None:
        await keep(data, make(1))
        old = (data / "history" / "cache.db").read_bytes()
        await keep(data, make(2))
        (data / "history" / "cache.db").write_bytes(old)
        with pytest.raises(HistoryError, match="lacks the newest 1 changes"):
            make_backup(data)
        assert list((data / "backups").iterdir()) == []

    async def test_damage_is_not_backed_up(self, data: Path) -> None:
        await keep(data, *(make(number) for number in range(1, 300)))
        path = data / "history" / "cache.db"
        content = bytearray(path.read_bytes())
        content[40960:49152] = os.urandom(8192)
        path.write_bytes(content)
        with pytest.raises(HistoryError, match="history restore"):
            make_backup(data)
        assert list((data / "backups").iterdir()) == []

    async def test_without_room_nothing_is_begun(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await keep(data, make(1))
        monkeypatch.setattr(backups, "SPARE_BYTES", 2**60)
        with pytest.raises(HistoryError, match=r"MiB free, .* are needed; free some disk space"):
            make_backup(data)

    async def test_a_copy_is_called_off(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        await keep(data, *(make(number) for number in range(1, 100)))
        monkeypatch.setattr(backups, "PAGES_PER_STEP", 1)
        with pytest.raises(backups.CalledOff):
            make_backup(data, lambda: True)
        assert list((data / "backups").iterdir()) == []

    async def test_two_at_once_wait_for_each_other(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await keep(data, *(make(number) for number in range(1, 100)))
        monkeypatch.setattr(backups, "PAGES_PER_STEP", 1)
        second_came, ending = threading.Event(), threading.Event()

        def come() -> bool:
            second_came.set()
            return ending.is_set()

        def second() -> Any:
            return make_backup(data, come)

        with ThreadPoolExecutor(2) as threads:
            waiting: list[Future[Any]] = []

            def in_the_middle() -> bool:
                if not waiting:
                    waiting.append(threads.submit(second))
                    assert second_came.wait(30)
                return False

            first = make_backup(data, in_the_middle)
            assert (waiting[0].result(30).writes, first.writes) == (99, 99)

            waiting.clear()
            second_came.clear()
            ending.set()
            make_backup(data, in_the_middle)
            with pytest.raises(backups.CalledOff):
                waiting[0].result(30)
        assert {path.suffix for path in (data / "backups").iterdir()} == {".db"}
        assert not (data / "backups" / backups.TEMPORARY).exists()

    async def test_the_folder_that_root_makes_is_the_servers(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await keep(data, make(1))
        owned: list[str] = []
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(os, "chown", lambda path, user, group: owned.append(Path(path).name))
        make_backup(data)
        assert "backups" in owned

    async def test_what_a_killed_one_left_is_removed(self, data: Path) -> None:
        await keep(data, make(1))
        (data / "backups").mkdir()
        (data / "backups" / backups.TEMPORARY).write_bytes(b"half a copy")
        made = make_backup(data)
        assert list((data / "backups").iterdir()) == [made.path]

    async def test_rotation_goes_by_changes_and_leaves_other_histories_alone(
        self, data: Path
    ) -> None:
        await keep(data, make(1))
        store = make_backup(data).store
        folder = data / "backups"
        for name in (
            f"history-20990101T000000Z-{store}-0.db",  # made when the clock was wrong
            f"history-20200101T000000Z-{store}-9.db",
            "history-20200101T000000Z-ffffffff-1.db",
            "notes.txt",
        ):
            (folder / name).touch()
        assert [path.name[-7:] for path in rotate(data, store, 2)] == [f"{store[-2:]}-0.db"]
        assert (folder / "history-20200101T000000Z-ffffffff-1.db").exists()
        assert (folder / "notes.txt").exists()
        assert [backup.writes for backup in list_backups(data, store)] == [9, 1]

    async def test_they_are_made_on_time_and_only_of_something_new(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backups, "LOOK_SECONDS", 0.01)
        async with opened(data) as history:
            keeper = Backups(data, hours=1e-9, kept=2)
            keeper.start()
            await asyncio.sleep(0.05)
            (data / "backups").mkdir()
            (data / "backups" / "history-20261399T000000Z-0123abcd-1.db").touch()  # no such day
            assert list_backups(data) == []
            for number in range(1, 5):
                await history.add(make(number))
                await eventually(partial(newest_is, data, number))
            await keeper.stop()
        assert [backup.writes for backup in list_backups(data)] == [4, 3]
        assert keeper.problem is None

    async def test_a_failure_is_told_until_one_succeeds(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backups, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(backups, "RETRY_SECONDS", 0.01)
        async with opened(data) as history:
            await history.add(make(1))
            keeper = Backups(data, hours=1, kept=2)
            with monkeypatch.context() as patch:
                patch.setattr(backups, "SPARE_BYTES", 2**60)
                keeper.start()
                problem = await eventually(lambda: keeper.problem)
                assert problem.startswith("no backup was made: the disk has")
            await eventually(lambda: keeper.problem is None)
            assert len(list_backups(data)) == 1
            await keeper.stop()

    async def test_none_are_made_when_they_are_off(self, data: Path) -> None:
        await keep(data, make(1))
        keeper = Backups(data, hours=0, kept=2)
        keeper.start()
        assert keeper._task is None
        await keeper.stop()


class TestRestore:
    async def test_the_best_copy_is_chosen_and_the_damage_kept(self, data: Path) -> None:
        path = data / "history" / "cache.db"
        await keep(data, make(1))
        make_backup(data)
        await keep(data, make(2))
        newer = make_backup(data)
        await keep(data, make(3))
        newest = make_backup(data)
        newest.path.write_bytes(b"garbage!" * 1000)
        path.write_bytes(b"damaged")
        done = restore(data)
        assert done.source == newer.path
        assert set(await kept(data)) == {1, 2}
        assert (done.aside / "cache.db").read_bytes() == b"damaged"
        assert make_backup(data).writes > 3, "what was restored is newer than every backup"

    async def test_what_is_left_in_place_may_be_the_best(self, data: Path) -> None:
        await keep(data, make(1))
        make_backup(data)
        await keep(data, make(2))
        left = (data / "history" / "cache.db").read_bytes()
        await keep(data, make(3))
        (data / "history" / "cache.db").write_bytes(left)
        with pytest.raises(HistoryError, match="lacks the newest 1 changes"):
            await kept(data)
        source = restore(data).source
        assert source is not None
        assert source.name == "cache.db"
        assert set(await kept(data)) == {1, 2}

    async def test_a_named_backup_wins(self, data: Path) -> None:
        await keep(data, make(1))
        older = make_backup(data)
        await keep(data, make(2))
        restore(data, Path(older.path.name))
        assert set(await kept(data)) == {1}

    async def test_what_is_no_history_is_refused(self, data: Path, tmp_path: Path) -> None:
        await keep(data, make(1))
        with sqlite3.connect(tmp_path / "other.db") as other:
            other.execute("CREATE TABLE t (x)")
        (tmp_path / "text").write_text("no database")
        for name, told in (
            ("other.db", "no backup of a history"),
            ("text", "not a database"),
            ("nothing", "no such file"),
        ):
            with pytest.raises(HistoryError, match=told):
                restore(data, tmp_path / name)
        assert set(await kept(data)) == {1}
        assert not list((data / "backups").glob("replaced-*"))

    async def test_another_history_is_not_taken_unasked(self, data: Path) -> None:
        await keep(data, make(1))
        backup = make_backup(data)
        shutil.rmtree(data / "history")
        await keep(data, make(2))
        (data / "history" / "cache.db").unlink()
        with pytest.raises(HistoryError, match="neither a readable history, nor a backup"):
            restore(data)
        restore(data, backup.path)
        assert set(await kept(data)) == {1}

    async def test_where_all_is_lost_the_videos_tell(self, data: Path) -> None:
        await keep(data, make(1))
        video(data, 1)
        made = make_backup(data)
        made.path.write_bytes(b"damaged")
        (data / "history" / "cache.db").write_bytes(b"damaged")
        with pytest.raises(HistoryError, match=r"no copy of the history is sound: .* videos"):
            restore(data)
        shutil.rmtree(data / "history")
        with pytest.raises(HistoryError, match=r"cache\.db is missing, and there are videos"):
            await kept(data)
        assert restore(data, Path("videos")).source is None
        assert (await kept(data))[1].status is JobStatus.COMPLETED
        made.path.unlink()
        shutil.rmtree(data / "history")
        assert restore(data).followed.adopted == 1
        assert set(await kept(data)) == {1}

    async def test_not_beside_a_server(self, data: Path) -> None:
        async with opened(data) as history:
            await history.add(make(1))
            make_backup(data)
            with pytest.raises(HistoryLocked, match=f"process {os.getpid()}"):
                restore(data)
            await history.add(make(2))
        assert set(await kept(data)) == {1, 2}

    async def test_the_records_follow_the_videos(self, data: Path) -> None:
        await keep(
            data,
            make(1, status=JobStatus.PROCESSING, attempts=1, starred=True, request_id="r"),
            make(2),
            make(3),
            completed(4),
            completed(5, deleted_at=1.0),
            completed(6),
            completed(9, deleted_at=1.0),  # and taken out of the trash since
        )
        make_backup(data)
        shutil.rmtree(data / "history")
        for number in (1, 2, 6, 7, 9):
            video(data, number)
        for number in (5, 8):
            video(data, number, "withheld")
        (data / "posters").mkdir(exist_ok=True)
        (data / "posters" / f"{job_id(7)}.webp").touch()
        followed = restore(data).followed
        assert (followed.adopted, followed.ended, followed.gone) == (2, 2, 1)
        jobs = await kept(data)
        assert {number: job.status.value for number, job in jobs.items()} == {
            3: "PENDING", **dict.fromkeys((1, 2, 4, 5, 6, 7, 8, 9), "COMPLETED"),
        }  # fmt: skip
        assert [jobs[1].starred, jobs[1].request_id, jobs[1].attempts] == [True, "r", 1]
        assert jobs[2].attempts == 1
        assert {number for number, job in jobs.items() if job.evicted_at} == {4}
        assert {number for number, job in jobs.items() if job.deleted_at} == {5, 8}
        assert jobs[5].deleted_at == 1.0
        adopted = jobs[7]
        assert (adopted.prompt, adopted.negative_prompt) == ("video 7", "dull")
        assert (adopted.seed, adopted.width, adopted.fps) == (2**32 - 7, 96, 12)
        assert adopted.submitted_at == 7e-6
        assert (adopted.video, adopted.poster) == (f"{job_id(7)}.mp4", f"{job_id(7)}.webp")

    @pytest.mark.parametrize(
        ("metadata", "told"),
        [
            ({"job_id": job_id(2)}, "it is the video of job"),
            ({"prompt": ""}, "prompt: got"),
            ({"seed": -1}, "seed: got -1"),
            ({"seed": None}, "seed: got None"),
            ({"kind": "trailer"}, "kind: got"),
            ({"parent_id": "../x"}, "job_id: got"),
            ({"width": 10**9}, "width: got"),
            ({"schedule": "slow"}, "schedule: got"),
            ({"guidance_scale": "4"}, "guidance_scale: got"),
        ],
    )
    def test_a_video_that_tells_nonsense_makes_no_record(
        self, metadata: dict[str, Any], told: str
    ) -> None:
        good = {
            "job_id": job_id(1), "kind": "preview", "prompt": "p", "seed": 1,
            "num_inference_steps": 8, "guidance_scale": 4.5, "height": 64, "width": 64,
            "num_frames": 7, "fps": 12, "schedule": "linear_quadratic", "lora_scale": 1.0,
        }  # fmt: skip
        assert adopt.rebuilt(job_id(1), good, 2.0).completed_processing_at == 2.0
        with pytest.raises(ValueError, match=told):
            adopt.rebuilt(job_id(1), good | metadata, 2.0)

    async def test_a_torn_video_stays_where_it_is(self, data: Path) -> None:
        await keep(data, make(1))
        make_backup(data)
        torn = data / "videos" / f"{job_id(2)}.mp4"
        torn.parent.mkdir()
        torn.write_bytes(b"torn")
        (strange,) = restore(data).followed.strange
        assert torn.name in strange
        assert torn.read_bytes() == b"torn"
        assert set(await kept(data)) == {1}

    @pytest.mark.parametrize("moment", range(6))
    async def test_a_crash_at_any_move_is_never_taken_for_a_history(
        self, data: Path, moment: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await keep(data, make(1))
        backup = make_backup(data)
        async with opened(data) as history:  # its newest change is in the -wal only
            await history.add(make(2))
            folder = data.parent / "killed"
            shutil.copytree(data, folder)
        moves = 0

        def crashing(move: Any) -> Any:
            def moved(source: Any, target: Any) -> Any:
                nonlocal moves
                if "restoring" not in str(target):  # while it is made ready, nothing is touched
                    moves += 1
                    if moves == moment + 1:
                        raise SystemExit("killed")
                return move(source, target)

            return moved

        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(os, "replace", crashing(os.replace))
            patch.setattr(Path, "replace", crashing(Path.replace))
            restore(folder, folder / "backups" / backup.path.name)
            assert moment == 5, "there are five moves"
        refused = False
        try:
            assert set(await kept(folder)) in ({1}, {1, 2})
            assert moment in (0, 4, 5), "the old history before, the new one after"
        except HistoryError:
            refused = True
        assert refused == (moment in (1, 2, 3))
        restore(folder, folder / "backups" / backup.path.name)
        assert set(await kept(folder)) == {1}


class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOCHI_DATA_DIR", str(data))

    async def test_a_sound_history(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        await keep(data, make(1), completed(2))
        before = sorted(path for path in data.rglob("*"))
        assert main(["check"]) == 0
        said = capsys.readouterr().out
        assert "no server runs on it" in said
        assert "history: sound, 2 jobs (1 PENDING, 1 COMPLETED), 2 changes" in said
        assert "backups: none" in said
        assert sorted(path for path in data.rglob("*")) == before, "a check leaves nothing behind"
        assert main(["backup"]) == 0
        assert main(["check"]) == 0
        assert "Z-" in capsys.readouterr().out

    async def test_beside_a_server(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        async with opened(data) as history:
            await history.add(make(1))
            assert main(["check"]) == 0
            assert f"process {os.getpid()} serves it" in capsys.readouterr().out
            assert main(["restore"]) == 2
            assert "cannot restore: " in capsys.readouterr().err
            await history.add(make(2))

    async def test_what_is_wrong_is_told(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        await keep(data, make(1))
        made = make_backup(data)
        made.path.write_bytes(made.path.read_bytes()[:8192])
        assert main(["check"]) == 1
        assert f"backup {made.path.name}: " in capsys.readouterr().out
        video(data, 2)
        made.path.unlink()
        assert main(["check"]) == 1
        assert f"videos: 1 without a record, first {job_id(2)}" in capsys.readouterr().out
        assert main(["restore"]) == 0
        assert "adopted 1 video" in capsys.readouterr().out
        assert main(["check"]) == 0
        (data / "history" / "cache.db").write_bytes(b"")
        assert main(["check"]) == 1
        assert "missing, empty" in capsys.readouterr().out

    def test_no_data_folder(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command, status in (("check", 1), ("backup", 2), ("restore", 2)):
            assert main([command]) == status
        assert not data.exists()
        assert main(["restore", "--data-dir", str(data / "x")]) == 2
        assert "no such data folder" in capsys.readouterr().err


async def test_no_damage_goes_unnoticed(data: Path) -> None:
    """Random damage to a database: refused, or everything is there as it was."""
    chance = random.Random(5)
    await keep(data, *(make(number, f"prompt {number}") for number in range(1, 60)))
    whole = await kept(data)
    path = data / "history" / "cache.db"
    sound = path.read_bytes()
    noticed = 0
    for _ in range(30):
        content = bytearray(sound)
        start = chance.randrange(len(content))
        size = chance.choice([1, 8, 512, 4096])
        match chance.choice(["flip", "zero", "letters", "stale"]):
            case "flip":
                content[start] ^= 1 << chance.randrange(8)
            case "zero":
                content[start : start + size] = bytes(len(content[start : start + size]))
            case "letters":
                content[start : start + size] = b"a" * len(content[start : start + size])
            case "stale":
                page, other = (chance.randrange(len(content) // 4096) * 4096 for _ in range(2))
                content[page : page + 4096] = sound[other : other + 4096]
        path.write_bytes(content)
        try:
            assert await kept(data) == whole
        except HistoryError:
            noticed += 1
    assert noticed > 10
