"""Metadata written into videos and read back out of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mochi_app.engine import encode
from mochi_app.errors import MediaError
from mochi_app.store import metadata
from mochi_app.store.metadata import parse_ffmetadata, read_metadata
from tests.videos import FRAMES


def test_metadata_survives_as_written(tmp_path: Path) -> None:
    metadata = {
        "quotes": "\"double\" 'single' `back`",
        "lines": "one\ntwo\r\nthree\ttab\u2028separator",
        "special": "a=b;c#d\\e\\n=;#\\ [x]\n[CHAPTER]\nTITLE=y",
        "emoji": "🎥👩‍🚀 家 ñ",
        "right to left": "\u202eabc\u202c \u200f שלום",
        "html": "<script>alert('x')</script> &amp; <b>",
        "ansi": "\x1b[31mred\x1b[0m \x07 \x7f \x9b",
        "end": "backslash\\",
        "number": 4294967295,
        "nested": {"seconds": [0.5, None, True]},
        "": "",
    }
    encode.write_video(FRAMES, tmp_path / "x.mp4", fps=12, prompt="=;#\\", metadata=metadata)
    assert read_metadata(tmp_path / "x.mp4") == metadata


@pytest.mark.parametrize(
    "name", ["-y.mp4", "a b;c#d=e.mp4", "concat:x.mp4", "%03d.mp4", "🎥 'x'.mp4"]
)
def test_a_files_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    encode.write_video(FRAMES, tmp_path / "x.mp4", fps=12, prompt="", metadata={"seed": 5})
    (tmp_path / "x.mp4").rename(tmp_path / name)
    assert read_metadata(tmp_path / name) == {"seed": 5}


def ffmpeg(*arguments: str) -> None:
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *arguments]
    subprocess.run(program, timeout=60, check=True)


def test_what_is_no_video_of_ours_is_said(tmp_path: Path) -> None:
    good = tmp_path / "good.mp4"
    encode.write_video(FRAMES, good, fps=12, prompt="p", metadata={"seed": 5})
    (tmp_path / "torn.mp4").write_bytes(good.read_bytes()[:40])
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    copy = ["-i", str(good), "-c", "copy", "-map_metadata", "-1"]
    ffmpeg(*copy, str(tmp_path / "bare.mp4"))
    ffmpeg(*copy, "-metadata", "comment=holiday", str(tmp_path / "other.mp4"))
    ffmpeg(*copy, "-metadata", "comment=[1, 2]", str(tmp_path / "array.mp4"))
    for name, reason in {
        "missing": "no such file",
        "torn": "not a whole MP4",
        "cut": "not a whole MP4",
        "empty": "not a whole MP4",
        "text": "not a whole MP4",
        "list": "not a whole MP4",
        "bare": "carries no metadata",
        "other": "not metadata of this app",
        "array": "not metadata of this app",
    }.items():
        with pytest.raises(MediaError, match=f"^'{name}.mp4': .*{reason}"):
            read_metadata(tmp_path / f"{name}.mp4")


def test_a_reader_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(sleeper))
    monkeypatch.setattr(metadata, "READ_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(MediaError, match=r"not read within 0\.2 s"):
        read_metadata(sleeper)


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_escaped_tags_are_read_as_they_were(tags: dict[str, str]) -> None:
    def escaped(text: str) -> str:
        return "".join(f"\\{char}" if char in "=;#\\\n" else char for char in text)

    tags = {key: value for key, value in tags.items() if key[0] not in ";#["}
    lines = [f"{escaped(key)}={escaped(value)}\n" for key, value in tags.items()]
    text = ";FFMETADATA1\n# a comment=no\n" + "".join(lines) + "[CHAPTER]\ntitle=chapter\n"
    assert parse_ffmetadata(text) == tags
