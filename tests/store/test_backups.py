"""Backups and restores of a history: made beside a writer, checked, rotated, put in place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.store import backups
from mochi_app.store.backups import Backups, list_backups, make_backup, rotate
from tests.conftest import eventually
from tests.histories import job_id, keep, make, open_history


def newest_is(data: Path, writes: int) -> bool:
    return [backup.writes for backup in list_backups(data)[:1]] == [writes]


class TestBackups:
    async def test_a_backup_beside_a_writer_is_one_moment_of_it(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backups, "PAGES_PER_STEP", 10)
        async with open_history(data) as history:
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
        with pytest.raises(HistoryError, match=r"mochi_app\.store restore"):
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
        monkeypatch.setattr(backups, "CHECK_SECONDS", 0.01)
        async with open_history(data) as history:
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
        monkeypatch.setattr(backups, "CHECK_SECONDS", 0.01)
        monkeypatch.setattr(backups, "RETRY_SECONDS", 0.01)
        async with open_history(data) as history:
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
