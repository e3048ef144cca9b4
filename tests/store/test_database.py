"""Writes that fail: a full disk, a lock, a folder that may only be read."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mochi_app.errors import HistoryError
from mochi_app.store import checks
from mochi_app.store import database as record_store
from mochi_app.store import writer as writer_module
from mochi_app.store.history import History
from mochi_app.store.job_index import JobQuery
from tests.conftest import eventually
from tests.histories import (
    Open,
    database,
    ids,
    job_id,
    make,
    refused,
    run_child,
)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the kernel's own write error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestWriteErrors:
    async def test_a_disk_that_takes_no_more(self, opened: Open, tmp_path: Path) -> None:
        history = await opened()
        await history.add(make(1))
        size = database(tmp_path).with_name("cache.db-wal").stat().st_size
        with file_size_limit(max(size, 40_960)):
            for _ in range(2):
                with pytest.raises(HistoryError, match="cannot write to the history"):
                    await history.add(make(2, options={"long": "x" * 100_000}))
                assert ids(history.list(JobQuery()).jobs) == [1]
            with pytest.raises(HistoryError, match="cannot write to the history"):
                await history.update(job_id(1), lambda job: replace(job, note="y" * 100_000))
            assert history.get(job_id(1)) == make(1)
        await history.add(make(3))
        assert ids((await opened()).list(JobQuery()).jobs) == [3, 1]

    async def test_locked_by_another_program(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record_store, "BUSY_SECONDS", 0.1)
        history = await opened()
        await history.add(make(1))
        other = sqlite3.connect(database(tmp_path), isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(HistoryError, match="locked; close the other program"):
                await history.add(make(2))
            assert ids(history.list(JobQuery()).jobs) == [1]
            await refused(opened, "cannot open the history .* locked; close the other program")
        assert ids((await opened()).list(JobQuery()).jobs) == [1]

    async def test_what_ails_is_told_until_it_heals_by_itself(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record_store, "BUSY_SECONDS", 0.05)
        monkeypatch.setattr(writer_module, "HEAL_SECONDS", 0.01)
        history = await opened()
        other = sqlite3.connect(database(tmp_path), isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(HistoryError, match="locked"):
                await history.add(make(1))
            assert history.problem == (
                "cannot write to the history: database is locked; close the other program that has"
                " the database open"
            )
        await eventually(lambda: history.problem is None)
        assert history.get(job_id(1)) is None

    async def test_a_transaction_left_open(self, history: History) -> None:
        """As a failed commit may leave it: the next write fails, the one after it does not."""
        await history._writer.run(lambda: history._store._cache._sql("BEGIN"))
        with pytest.raises(HistoryError, match="cannot write to the history"):
            await history.add(make(1))
        assert await history.add(make(2))
        assert ids(history.list(JobQuery()).jobs) == [2]

    async def test_the_first_error_is_the_one_told(self, history: History) -> None:
        """The rollback after it fails as well, and says less."""
        spoil = (
            "CREATE TRIGGER spoil BEFORE INSERT ON Cache BEGIN "
            "SELECT RAISE(ROLLBACK, 'database or disk is full'); END"
        )
        await history._writer.run(lambda: history._store._cache._sql(spoil))
        with pytest.raises(HistoryError, match="disk is full; free some disk space"):
            await history.add(make(1))
        await history._writer.run(lambda: history._store._cache._sql("DROP TRIGGER spoil"))
        assert await history.add(make(1))

    async def test_a_write_that_failed_after_it_was_made(
        self, history: History, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = record_store.RecordStore.write

        def made_and_failed(store: record_store.RecordStore, rows: checks.Rows) -> None:
            write(store, rows)
            raise HistoryError("the disk did not say so")

        with monkeypatch.context() as patch:
            patch.setattr(record_store.RecordStore, "write", made_and_failed)
            with pytest.raises(HistoryError, match="did not say so"):
                await history.add(make(1, request_id="r"))
        assert history.get(job_id(1)) == make(1, request_id="r")
        assert (await history.add(make(2, request_id="r"))).id == job_id(1)

    async def test_a_read_only_database(self) -> None:
        """In a child without root's rights, since root may write anywhere."""
        program = """
            import asyncio, os, sys
            from pathlib import Path
            from mochi_app.errors import HistoryError
            from mochi_app.store.history import History

            if os.getuid() == 0:
                os.setgid(65534), os.setuid(65534)

            async def main():
                try:
                    await History.open(Path(sys.argv[1]))
                except HistoryError as error:
                    print(error)

            asyncio.run(main())
        """
        with tempfile.TemporaryDirectory() as name:  # tmp_path is for this user only
            data = Path(name) / "data"
            history = await History.open(data)
            await history.close()
            for path, mode in ((data.parent, 0o755), (data, 0o777), (data / "history", 0o777)):
                path.chmod(mode)
            (data / "server.lock").chmod(0o666)
            (data / "history" / "cache.db").chmod(0o444)
            said, _ = run_child(program, data).communicate(timeout=20)
        assert "attempt to write a readonly database; make the folder" in said, said

    async def test_writes_after_close(self, opened: Open) -> None:
        history = await opened()
        await history.add(make(1))
        await history.close()
        await history.close()
        with pytest.raises(HistoryError, match="closed"):
            await history.add(make(2))

    async def test_close_finishes_what_waits(self, opened: Open) -> None:
        history = await opened()
        adding = [asyncio.ensure_future(history.add(make(number))) for number in range(1, 251)]
        await asyncio.sleep(0)
        await history.close()
        assert all(task.done() for task in adding)
        assert len(await opened()) == 250
