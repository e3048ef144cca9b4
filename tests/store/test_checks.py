"""What a history is checked for as it is opened: foreign rows, damage, other versions."""

# ruff: noqa: ASYNC240 - a test may hold up its own loop

from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.store.checks import RecordDisk
from mochi_app.store.history import History
from tests.histories import (
    Open,
    by_hand,
    database,
    job_id,
    make,
    refused,
)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["BOMB"]),)


class TestRecordDisk:
    async def test_a_pickled_row_is_refused_and_not_run(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bomb = tmp_path / "exploded"
        monkeypatch.setenv("BOMB", str(bomb))
        history = await opened()
        await history.add(make(1))
        await history.close()
        with by_hand(database(tmp_path)) as rows:
            rows.execute("UPDATE Cache SET mode=4, value=? WHERE key=?", (
                pickle.dumps(Bomb()), f"job:{job_id(1)}",
            ))  # fmt: skip
        with pytest.raises(HistoryError, match="mode 4 was not written by this app"):
            await opened()
        assert not bomb.exists()

    @pytest.mark.parametrize(
        ("mode", "filename", "value"),
        [(4, None, b"x"), (2, "a.val", None), (3, "a.val", None), (1, None, b"{}"), (1, None, 5)],
    )
    def test_only_its_own_rows_are_read(
        self, tmp_path: Path, mode: int, filename: str | None, value: Any
    ) -> None:
        disk = RecordDisk(str(tmp_path))
        with pytest.raises(HistoryError, match="was not"):
            disk.fetch(mode, filename, value, False)
        with pytest.raises(HistoryError, match="no JSON"):
            disk.fetch(1, None, "{", False)
        with pytest.raises(HistoryError, match="no text key"):
            disk.get(pickle.dumps("key"), 0)
        with pytest.raises(TypeError, match="texts"):
            disk.put(("a", 1))

    async def test_large_records_stay_in_the_database(
        self, history: History, tmp_path: Path
    ) -> None:
        long = "x" * 200_000
        assert RecordDisk(str(tmp_path), min_file_size=1).store(long, False)[2] is None
        await history.add(make(1, options={"long": long}))
        names = {path.name for path in (tmp_path / "data" / "history").rglob("*")}
        assert names <= {"cache.db", "cache.db-wal", "cache.db-shm", "store.json"}

    async def test_nothing_is_evicted_and_commits_are_full(
        self, history: History, tmp_path: Path
    ) -> None:
        await history.close()
        with by_hand(database(tmp_path)) as rows:
            settings = dict(rows.execute("SELECT key, value FROM Settings").fetchall())
        assert settings["eviction_policy"] == "none"
        assert settings["cull_limit"] == 0
        assert settings["size_limit"] >= 2**60
        assert settings["sqlite_synchronous"] == 2
        assert settings["statistics"] == 0


class TestDamage:
    @pytest.fixture
    async def full(self, opened: Open, tmp_path: Path) -> Path:
        """The database of a history of 300 jobs, closed."""
        history = await opened()
        await asyncio.gather(*(history.add(make(number)) for number in range(1, 301)))
        await history.close()
        return database(tmp_path)

    async def test_a_zero_byte_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(b"")
        await refused(opened, r"missing, empty, or not the history .* \(of 300 jobs\): restore")
        assert full.stat().st_size == 0  # left as it was found

    async def test_a_missing_database(self, opened: Open, full: Path) -> None:
        full.unlink()
        await refused(opened, "missing, empty, or not the history")
        assert not full.exists()

    async def test_a_swapped_database(self, opened: Open, full: Path, tmp_path: Path) -> None:
        other = await History.open(tmp_path / "other")
        await other.close()
        full.write_bytes((tmp_path / "other" / "history" / "cache.db").read_bytes())
        await refused(opened, "not the history that was here")

    async def test_garbage_for_a_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(b"garbage!" * 4096)
        await refused(opened, "not a database; restore a backup")

    async def test_garbage_in_the_middle(self, opened: Open, full: Path) -> None:
        content = bytearray(full.read_bytes())
        middle = len(content) // 2 // 4096 * 4096
        content[middle : middle + 8192] = os.urandom(8192)
        full.write_bytes(content)
        await refused(opened, "restore a backup")

    async def test_damage_where_no_record_is_read(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            find = "SELECT rootpage FROM sqlite_master WHERE name = 'Cache_expire_time'"
            ((page,),) = rows.execute(find).fetchall()
            ((size,),) = rows.execute("PRAGMA page_size").fetchall()
        content = bytearray(full.read_bytes())
        content[(page - 1) * size : page * size] = os.urandom(size)
        full.write_bytes(content)
        await refused(opened, "is damaged .* restore a backup")

    async def test_another_letter_in_one_record(self, opened: Open, full: Path) -> None:
        content = full.read_bytes()
        full.write_bytes(content.replace(b"red circle", b"rad circle", 1))
        await refused(opened, "history row 'job:.* was changed on the disk: restore a backup")

    async def test_a_row_that_has_gone_missing(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute("DROP TRIGGER Settings_count_delete")
            rows.execute("DELETE FROM Cache WHERE key = ?", (f"job:{job_id(7)}",))
        await refused(opened, r"is damaged \(300 rows and 300 in its index, 301 were written\)")

    async def test_a_truncated_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(full.read_bytes()[: full.stat().st_size // 2])
        await refused(opened, "restore a backup")

    async def test_a_record_that_cannot_be_read(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL, value='{\"schema\":99}' WHERE key LIKE 'job:%'"
            )
        await refused(opened, "cannot be read: it is no record of that job")

    async def test_a_record_of_a_later_version(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL, value=json_set(value, '$.schema', 99)"
                " WHERE key LIKE 'job:%'"
            )
        await refused(opened, "schema 99")

    async def test_a_record_of_an_earlier_version(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL,"
                " value=json_remove(value, '$.schema', '$.note', '$.options')"
                " WHERE key LIKE 'job:%'"
            )
        history = await opened()
        assert history.get(job_id(1)) == make(1)

    async def test_a_damaged_sentinel_beside_a_sound_database(
        self, opened: Open, full: Path
    ) -> None:
        (full.parent / "store.json").write_bytes(b"\x00\x00")
        assert len(await opened()) == 300
        (full.parent / "store.json").unlink()
        assert len(await opened()) == 300

    async def test_a_first_start_cut_short_is_begun_again(
        self, opened: Open, tmp_path: Path
    ) -> None:
        database(tmp_path).parent.mkdir(parents=True)
        database(tmp_path).write_bytes(b"")
        assert len(await opened()) == 0

    async def test_a_data_folder_that_is_a_file(self, opened: Open, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("not a folder")
        await refused(opened, "cannot open the history in .*data/history: .*directory")

    async def test_a_refused_open_leaves_the_folder_free(self, opened: Open, full: Path) -> None:
        content = full.read_bytes()
        full.write_bytes(b"")
        await refused(opened, "missing, empty")
        full.write_bytes(content)
        assert len(await opened()) == 300
