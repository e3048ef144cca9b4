"""The scratch folder that a rank holds: found again wherever it was moved, made anew if removed."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from mochi_app.engine.encode import EncodeError
from mochi_app.engine.scratch import Scratch, refused


def test_a_video_lands_in_the_folder_that_was_given(tmp_path: Path) -> None:
    given = tmp_path / "data" / "scratch" / "0"
    given.mkdir(parents=True)
    scratch = Scratch(str(given))
    scratch.folder()
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    subprocess.run(["touch", scratch.folder() / "by a child"], check=True)
    assert (tmp_path / "away" / "scratch" / "0" / "by a child").exists()
    assert not any((tmp_path / "data").iterdir())


def test_a_removed_folder_is_made_again_but_not_its_parents(tmp_path: Path) -> None:
    given = tmp_path / "scratch" / "0"
    given.mkdir(parents=True)
    scratch = Scratch(str(given))
    scratch.folder()
    given.rmdir()
    (scratch.folder() / "file").touch()
    assert (given / "file").exists()
    (given / "file").unlink()
    given.rmdir()
    given.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        scratch.folder()
    assert not given.parent.exists()


@pytest.mark.parametrize(
    ("error", "is_folders"),
    [
        (OSError(errno.EROFS, "", "/s/0/x.webp"), True),
        (OSError(errno.ESTALE, ""), True),
        (FileNotFoundError(errno.ENOENT, "", "/usr/bin/ffmpeg"), False),
        (OSError(errno.ENAMETOOLONG, "", "/s/0/x.webp"), False),
        (EncodeError("ffmpeg ended with status 226: x.mp4: Read-only file system"), True),
        (EncodeError("frames of shape (1,): expected (F, H, W, 3), uint8"), False),
    ],
)
def test_what_is_the_folders_trouble(error: Exception, is_folders: bool) -> None:
    assert refused(error, Path("/s/0")) is is_folders
