"""One server a data folder."""

# ruff: noqa: ASYNC220 - a test may hold up its own loop

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mochi_app.store.history import History
from mochi_app.store.lock import HistoryLocked
from tests.histories import (
    WRITER,
    Open,
    make,
    run_child,
)


class TestLock:
    async def test_a_second_server_is_refused_with_the_pid_of_the_first(
        self, opened: Open, tmp_path: Path
    ) -> None:
        child = run_child(WRITER, tmp_path / "data")
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        try:
            with pytest.raises(HistoryLocked, match=f"in use by process {child.pid}:") as caught:
                await opened()
            assert caught.value.pid == child.pid
        finally:
            child.kill()
            child.communicate()
        history = await opened()  # the lock died with its process
        assert await history.add(make(10**9)) == make(10**9)

    async def test_a_second_open_in_one_process_is_refused(
        self, history: History, tmp_path: Path
    ) -> None:
        with pytest.raises(HistoryLocked, match=f"in use by process {os.getpid()}"):
            await History.open(tmp_path / "data")

    async def test_no_child_inherits_the_lock(self, opened: Open) -> None:
        history = await opened()
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
        try:
            await history.close()
            await opened()
        finally:
            child.kill()
            child.wait()
