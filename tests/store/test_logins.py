"""Ended logins: kept over a restart, bounded, and never revived."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from mochi_app.settings import SettingsError
from mochi_app.store import logins
from mochi_app.store.logins import EndedLogins

SOON = 4e9  # seconds since 1970: by any clock of this century in the future


async def test_what_ended_stays_so_over_a_restart(tmp_path: Path) -> None:
    ended = EndedLogins(tmp_path)
    assert not ended.has("ann", 0, "first")
    await asyncio.gather(*(ended.add("ann", login, SOON) for login in ("first", "second", "third")))
    await ended.add("bob", "fourth", SOON)
    for known in (ended, EndedLogins(tmp_path)):
        assert known.has("ann", 0, "first")
        assert known.has("ann", 0, "third")
        assert known.has("bob", 0, "fourth")
        assert not known.has("bob", 0, "first")
        assert not known.has("ann", 0, "fifth")


async def test_the_list_is_bounded_and_what_it_forgets_does_not_revive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "MOST_ENDED", 3)
    ended = EndedLogins(tmp_path)
    for number in range(4):
        await ended.add("ann", f"long ago {number}", 1.0)
    assert not ended.has("ann", 0, "in use")  # four that are too old anyway made room
    for number in range(3):
        await ended.add("ann", f"today {number}", SOON)
    assert ended.has("ann", 0, "today 0")
    assert not ended.has("ann", 0, "in use")
    await ended.add("ann", "today 3", SOON)
    assert not ended.has("bob", 0, "his")
    for known in (ended, EndedLogins(tmp_path)):
        assert known.series("ann") == 1
        for login in ("today 0", "today 3", "in use"):
            assert known.has("ann", 0, login)
        assert not known.has("ann", 1, "a new one")
        assert known.series("bob") == 0
    for number in range(40):
        await ended.add("ann", f"more {number}", SOON)
    assert len((tmp_path / logins.FILE).read_text()) < 500


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"ann": {"series": "x"}}', b"\xff"])
def test_a_damaged_file_is_named_and_told_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / logins.FILE
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape(f"{path}: expected")) as told:
        EndedLogins(tmp_path)
    assert "Remove it together with secret.key" in str(told.value)


async def test_a_full_disk_ends_the_login_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    ended = EndedLogins(tmp_path)
    with monkeypatch.context() as harmed:
        harmed.setattr(logins, "replace_file", full)
        await ended.add("ann", "first", SOON)
    assert ended.has("ann", 0, "first")
    assert "a logout of ann could not be kept beyond a restart" in caplog.text
    await ended.add("bob", "second", SOON)
    assert EndedLogins(tmp_path).has("ann", 0, "first")
