"""Restores: the best copy wins, the damage is kept, the videos tell what no copy knows."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import JobStatus
from mochi_app.store import adopt
from mochi_app.store.backups import make_backup
from mochi_app.store.lock import HistoryLocked
from mochi_app.store.restore import restore
from tests.histories import completed, job_id, keep, kept, make, open_history
from tests.videos import video


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
        async with open_history(data) as history:
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
        async with open_history(data) as history:  # its newest change is in the -wal only
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
