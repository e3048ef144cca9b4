"""What the encoder writes, read back by ffmpeg and Pillow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from mochi_app.engine import encode
from mochi_app.engine.encode import EncodeError, Frames
from mochi_app.store.metadata import dump_ffmetadata, parse_ffmetadata, read_metadata
from tests.places import ROOT


def moving_square(count: int = 13, height: int = 64, width: int = 80) -> Frames:
    """A red square on grey that moves to the right; every frame differs."""
    frames = np.full((count, height, width, 3), 100, np.uint8)
    for index, frame in enumerate(frames):
        frame[20:40, 2 * index : 2 * index + 20] = (210, 40, 40)
    return frames


def save(frames: Frames, folder: Path, **change: Any) -> encode.Output:
    given: dict[str, Any] = {"fps": 12, "prompt": "a red square", "metadata": {"seed": 1}} | change
    return encode.save(frames, folder, "job", **given)


def test_a_video_for_browsers(tmp_path: Path) -> None:
    output = save(moving_square(), tmp_path / "scratch")
    assert output == encode.Output(video="job.mp4", poster="job.webp")
    assert {path.name for path in (tmp_path / "scratch").iterdir()} == {"job.mp4", "job.webp"}
    path = tmp_path / "scratch" / output.video
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    reader.close()
    assert about["codec"] == "h264"
    assert about["pix_fmt"] == "yuv420p(tv, bt709, progressive)"
    assert about["fps"] == 12
    assert about["size"] == (80, 64)
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 13
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is all there


def test_colours_survive(tmp_path: Path) -> None:
    frames = np.empty((7, 64, 64, 3), np.uint8)
    frames[:] = (200, 30, 90)
    save(frames, tmp_path)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "job.mp4"))
    next(reader)
    decoded = np.frombuffer(next(reader), np.uint8).reshape(64, 64, 3)
    reader.close()
    assert np.abs(decoded.astype(int) - frames[0]).max() <= 3


def test_the_poster_is_the_middle_frame(tmp_path: Path) -> None:
    frames = moving_square()
    save(frames, tmp_path)
    with Image.open(tmp_path / "job.webp") as poster:
        assert poster.format == "WEBP"
        pixels = np.asarray(poster.convert("RGB")).astype(int)
    errors = [np.abs(pixels - frame).mean() for frame in frames.astype(int)]
    assert int(np.argmin(errors)) == 6


def test_equal_frames_give_an_equal_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(moving_square(), tmp_path / name)
    assert (tmp_path / "a/job.mp4").read_bytes() == (tmp_path / "b/job.mp4").read_bytes()


def test_the_title_is_for_players_and_the_comment_is_exact(tmp_path: Path) -> None:
    prompt = "line one\nline two\t\x1b[31mred\x07 \u202eabc <b>&amp;"
    save(moving_square(7), tmp_path, prompt=prompt, metadata={"prompt": prompt})
    tags = parse_ffmetadata(dump_ffmetadata(tmp_path / "job.mp4"))
    assert tags["title"] == "line one line two [31mred \u202eabc <b>&amp;"
    assert read_metadata(tmp_path / "job.mp4") == {"prompt": prompt}


def test_a_long_title_is_cut() -> None:
    assert encode.title("x" * 200) == "x" * 200
    assert encode.title("x" * 201) == "x" * 199 + "…"
    assert encode.title("\ud800 a") == "? a"


def test_the_longest_prompts_fit(tmp_path: Path) -> None:
    metadata = {"prompt": "\U0001f3a5" * 2000, "negative_prompt": "\U0001f3a5" * 2000}
    save(moving_square(7), tmp_path, prompt=metadata["prompt"], metadata=metadata)
    assert read_metadata(tmp_path / "job.mp4") == metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"x": "a" * 100_000}, "metadata of 100008 bytes"),
        ({"x": object()}, "not JSON"),
        ({"x": float("nan")}, "not JSON"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        encode.comment(metadata)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 64, 64, 3), np.uint8), np.zeros((7, 64, 64), np.uint8), np.zeros((7, 64, 64, 3))],
    ids=["none", "grey", "float"],
)
def test_frames_of_another_shape_are_refused(frames: Any, tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match=re.escape(f"frames of shape {frames.shape}")):
        save(frames, tmp_path)


def test_a_video_that_cannot_be_written_is_an_error_with_ffmpegs_words(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "x.mp4"
    with pytest.raises(EncodeError, match=r"status \d+: .*No such file or directory"):
        encode.write_video(moving_square(7), target, fps=12, prompt="", metadata={})


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_video(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    code = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from mochi_app.engine import encode\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "frames = np.random.default_rng(0).integers(0, 255, (13, 64, 64, 3), np.uint8)\n"
        "try:\n"
        "    encode.save(frames, Path(sys.argv[1]), 'job', fps=12, prompt='', metadata={})\n"
        "except encode.EncodeError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "ffmpeg ended with status" in done.stderr
    assert not (tmp_path / "job.mp4").exists()
