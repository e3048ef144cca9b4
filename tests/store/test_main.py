"""`python -m mochi_app.store`, as an operator runs it."""

# ruff: noqa: ASYNC240 - a test may hold up its own loop

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mochi_app.store.__main__ import main
from mochi_app.store.backups import make_backup
from tests.histories import completed, job_id, keep, make, open_history
from tests.videos import video


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
        async with open_history(data) as history:
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
