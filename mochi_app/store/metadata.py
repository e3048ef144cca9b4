"""Read prompt, seed and parameters back out of a video or a poster."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from PIL import ExifTags, Image

from mochi_app import xmp
from mochi_app.errors import MediaError
from mochi_app.request import safe_repr

READ_TIMEOUT_SECONDS = 30


def read_metadata(path: Path) -> dict[str, Any]:
    """What `engine/encode.py` wrote into the MP4 at `path`: the request and what made it. Read from
    the comment, or from the XMP if a service has blanked the comment.

    Raises:
        MediaError: no such file, not an MP4, an incomplete one, or one without this app's metadata.
    """
    name = safe_repr(path.name)
    if not path.is_file():
        raise MediaError(f"{name}: no such file")
    comment = parse_ffmetadata(dump_ffmetadata(path)).get("comment")
    first = [] if comment is None else [comment]
    try:
        texts = [*first, *xmp.read_requests(path)]
    except OSError as error:
        raise MediaError(f"{name}: {error.strerror}") from error
    records = [record for text in texts if (record := xmp.parse_request(text)) is not None]
    if not texts:
        raise MediaError(f"{name}: the video carries no metadata")
    if not records:
        raise MediaError(f"{name}: the video's comment is not metadata of this app")
    # A comment that another program put in place of ours may be JSON as well.
    return next((record for record in records if "prompt" in record), records[0])


def read_poster_metadata(path: Path) -> dict[str, Any]:
    """What `engine/encode.py` wrote into the WebP at `path`: the same as into its video.

    Raises:
        MediaError: no such file, not a WebP, or one without this app's metadata.
    """
    name = safe_repr(path.name)
    if not path.is_file():
        raise MediaError(f"{name}: no such file")
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            given = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: not a whole WebP ({type(error).__name__})") from None
    if not isinstance(given, bytes) or not given.startswith(xmp.ASCII_COMMENT):
        raise MediaError(f"{name}: the poster carries no metadata")
    text = given.removeprefix(xmp.ASCII_COMMENT).rstrip(b"\0").decode("ascii", "replace")
    record = xmp.parse_request(text)
    if record is None:
        raise MediaError(f"{name}: the poster's comment is not metadata of this app")
    return record


def dump_ffmetadata(path: Path) -> str:
    """The tags of an MP4 in ffmpeg's text form.

    The demuxer and the protocol are fixed: a file that claims to be a playlist opens nothing else.

    Raises:
        MediaError: ffmpeg does not read it as an MP4, or takes too long.
    """
    name = safe_repr(path.name)
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error"]
    source = ["-protocol_whitelist", "file", "-f", "mp4", "-i", f"file:{path.resolve()}"]
    tags = ["-f", "ffmetadata", "pipe:1"]
    # ffmpeg succeeds on a file without streams: ask for a packet of the video, too.
    packet = ["-map", "0:v:0", "-c", "copy", "-frames:v", "1", "-f", "null", "-"]
    try:
        done = subprocess.run(
            [*program, *source, *tags, *packet],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=READ_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MediaError(f"{name}: not read within {READ_TIMEOUT_SECONDS} s") from None
    if done.returncode != 0:
        raise MediaError(f"{name}: not a whole MP4 (ffmpeg ended with {done.returncode})")
    return done.stdout.decode("utf-8", "replace")


def parse_ffmetadata(text: str) -> dict[str, str]:
    r"""The global tags of an ffmetadata text; of duplicate names the last one wins.

    The format (ffmpeg's formats manual): lines `key=value`; `=`, `;`, `#`, `\` and a line feed are
    escaped by a backslash; lines that start with `;` or `#` are comments; `[...]` begins a section.
    """
    tags: dict[str, str] = {}
    key: str | None = None
    word: list[str] = []
    characters = iter(text if text.endswith("\n") else text + "\n")
    for char in characters:
        if char == "\\":
            word.append(next(characters, ""))
        elif char == "=" and key is None:
            key, word = "".join(word), []
        elif char == "\n":
            line = "".join(word)
            if key is not None:
                if not key.startswith((";", "#")):
                    tags[key] = line
            elif line.startswith("[") and line.endswith("]"):
                break
            key, word = None, []
        else:
            word.append(char)
    return tags
