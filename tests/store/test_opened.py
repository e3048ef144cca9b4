"""Paths that lead to what was opened by them, or do not."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mochi_app.store.opened import Opened, leads_to


@pytest.fixture
def held(tmp_path: Path) -> Opened:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    opened = Opened()
    for path in (tmp_path / "folder", tmp_path / "folder" / "file"):
        opened.hold(path)
    return opened


def test_a_file_that_is_replaced_is_a_stranger_until_it_is_back(
    held: Opened, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "file"
    assert held.stranger() is None
    path.rename(tmp_path / "aside")
    assert held.stranger() == path
    path.write_text("mine")
    assert held.stranger() == path
    path.unlink()
    path.symlink_to(path)
    assert held.stranger() == path
    path.unlink()
    (tmp_path / "aside").rename(path)
    assert held.stranger() is None


def test_the_folder_is_told_before_what_is_in_it(held: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.rename(tmp_path / "aside")
    assert held.stranger() == folder
    folder.touch()
    assert held.stranger() == folder
    folder.unlink()
    folder.symlink_to(tmp_path / "aside")
    assert held.stranger() is None


def test_a_number_is_not_given_to_another_file(held: Opened, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    for _ in range(20):
        path.unlink()
        path.write_text("another")
        assert held.stranger() == path


def test_letting_go_leaves_the_locks_of_others(tmp_path: Path) -> None:
    path = tmp_path / "database"
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        opened = Opened()
        opened.hold(path)
        opened.close()
        assert opened.stranger() is None
        locks = Path("/proc/locks").read_text()
        assert f":{path.stat().st_ino} " in locks


def test_a_disk_that_does_not_say_is_no_answer(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="too long"):
            leads_to(tmp_path / ("x" * 5000), descriptor)
    finally:
        os.close(descriptor)
