"""Write frames as an H.264 MP4 and a WebP poster, with the request embedded in both.

Owns the encoder's options and how metadata is put into the file. It does not own where files end
up: `store/media.py` puts them in place, and `store/metadata.py` reads the metadata back. numpy in,
files out; no torch.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from mochi_app import xmp
from mochi_app.files import fsync

Frames = npt.NDArray[np.uint8]

CRF = 18
# Fixed, so that equal frames give an equal file: x264's output depends on its thread count.
THREADS = 2
# Linux takes at most 128 KiB in one command line argument.
MAX_COMMENT_BYTES = 96 * 1024
MAX_TITLE_CHARS = 200
POSTER_QUALITY = 82
TIMEOUT_SECONDS = 600


class EncodeError(RuntimeError):
    """The video could not be written. The message is ffmpeg's, or says why the input is bad."""


@dataclass(frozen=True, slots=True)
class Output:
    """File names of a finished video and its poster, inside the folder they were written to."""

    video: str
    poster: str


def comment(metadata: Mapping[str, Any]) -> str:
    """`metadata` as the MP4's comment: one line of ASCII JSON.

    Raises:
        EncodeError: it cannot be JSON, or is longer than `MAX_COMMENT_BYTES`.
    """
    try:
        text = json.dumps(dict(metadata), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise EncodeError(f"metadata is not JSON: {error}") from error
    if len(text) > MAX_COMMENT_BYTES:
        raise EncodeError(f"metadata of {len(text)} bytes: at most {MAX_COMMENT_BYTES} fit a file")
    return text


def title(prompt: str) -> str:
    """`prompt` as a title for players: one line, no control characters, bounded.

    The exact prompt is in the comment.
    """
    printable = "".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in prompt)
    line = " ".join(printable.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= MAX_TITLE_CHARS else line[: MAX_TITLE_CHARS - 1] + "…"


def save(
    frames: Frames,
    folder: Path,
    job_id: str,
    *,
    fps: int,
    prompt: str,
    metadata: Mapping[str, Any],
) -> Output:
    """Write `<job_id>.mp4` and `<job_id>.webp` (its middle frame) into `folder`.

    Both are written under temporary names first, so a file with its final name is complete.

    Args:
        frames: RGB, shape (F, H, W, 3); H and W even.
        folder: created if missing.
        fps: frames per second.
        metadata: JSON-ready; stored in the video's comment and XMP, and in the poster's EXIF.

    Raises:
        EncodeError: metadata that does not fit, or a failure of the encoder.
        OSError: the poster could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = Output(video=f"{job_id}.mp4", poster=f"{job_id}.webp")
    # Keep the suffixes: ffmpeg and Pillow choose the format by them.
    video, poster = folder / f"tmp-{output.video}", folder / f"tmp-{output.poster}"
    write_video(frames, video, fps=fps, prompt=prompt, metadata=metadata)
    write_poster(frames[len(frames) // 2], poster, prompt=prompt, metadata=metadata)
    for path in (video, poster):  # complete under its final name even after a power cut
        fsync(path)
    poster.replace(folder / output.poster)
    video.replace(folder / output.video)
    return output


def write_video(
    frames: Frames, path: Path, *, fps: int, prompt: str, metadata: Mapping[str, Any]
) -> None:
    """Encode `frames`, RGB of shape (F, H, W, 3), as H.264 yuv420p in an MP4 at `path`.

    Runs ffmpeg directly: `imageio_ffmpeg.write_frames` drops the exit status, so a disk that fills
    up while the file is finalised would look like success.

    Raises:
        EncodeError: ffmpeg failed; the message ends with its output.
        OSError: the XMP cannot be appended to the encoded video.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise EncodeError(
            f"frames of shape {frames.shape}, {frames.dtype}: expected (F, H, W, 3), uint8"
        )
    command = _command(frames.shape[1:3], path, fps, title(prompt), comment(metadata))
    try:
        subprocess.run(
            command,
            input=np.ascontiguousarray(frames).data.cast("B"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise EncodeError(
            f"ffmpeg ended with status {error.returncode}: {_tail(error.stdout)}"
        ) from None
    except subprocess.TimeoutExpired:
        raise EncodeError(f"ffmpeg did not end within {TIMEOUT_SECONDS} s") from None
    with path.open("ab") as file:  # at the end, so that no media offset changes
        file.write(xmp.box(prompt, comment(metadata)))


def write_poster(
    frame: Frames, path: Path, *, prompt: str = "", metadata: Mapping[str, Any] | None = None
) -> None:
    """Write one RGB frame, shape (H, W, 3), as a WebP at its own size. The request is in its EXIF:
    a title as its description, `comment(metadata)` as its user comment."""
    exif = Image.Exif()
    if metadata is not None:
        exif[ExifTags.Base.ImageDescription] = title(prompt).encode("utf-8")
        # Of the character sets that EXIF names, ASCII is the one that all programs read.
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = xmp.ASCII_COMMENT + comment(
            metadata
        ).encode("ascii")
    Image.fromarray(frame).save(path, format="WEBP", quality=POSTER_QUALITY, method=4, exif=exif)


def _command(size: tuple[int, int], path: Path, fps: int, title: str, comment: str) -> list[str]:
    """ffmpeg's command line: raw RGB on stdin, an MP4 for browsers at `path`."""
    height, width = size
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    # Colours are converted to BT.709 and labelled as such: no player has to guess the matrix.
    convert = (
        "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,"
        "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    )
    codec = ["-c:v", "libx264", "-crf", str(CRF), "-preset", "veryfast", "-threads", str(THREADS)]
    # One key frame a second makes scrubbing pleasant; +faststart lets playback begin at once.
    stream = ["-pix_fmt", "yuv420p", "-g", str(fps), "-movflags", "+faststart"]
    exact = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1"]
    tags = ["-metadata", f"title={title}", "-metadata", f"comment={comment}"]
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error", "-y"]
    return [
        *program, *source, "-i", "pipe:0", "-an", "-vf", convert,
        *codec, *stream, *exact, *tags, "-f", "mp4", str(path),
    ]  # fmt: skip


def _tail(output: bytes, limit: int = 400) -> str:
    """The end of ffmpeg's output, on one line."""
    return " ".join(output.decode("utf-8", "replace").split())[-limit:]
