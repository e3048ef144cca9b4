"""The request inside video and poster, after what others do to files, and in hostile ones."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from mochi_app import xmp
from mochi_app.engine import encode
from mochi_app.errors import MediaError
from mochi_app.store import restore as recovery
from mochi_app.store.metadata import (
    dump_ffmetadata,
    parse_ffmetadata,
    read_metadata,
    read_poster_metadata,
)
from tests.histories import kept
from tests.videos import blank_tags, box, boxes, video

FRAMES = np.random.default_rng(1).integers(0, 255, (7, 64, 64, 3), dtype=np.uint8)

PROMPT = 'a <b>bold</b> & "quoted" ]]> \x00\x1b[31m\u202eright\u202c שלום 🎥 \ufffe end\r\n\ttwo'

METADATA: dict[str, Any] = {"job_id": "1", "prompt": PROMPT, "seed": 4294967295}

UUID = xmp.XMP_UUID


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A video as the engine writes it."""
    path = tmp_path / "x.mp4"
    encode.write_video(FRAMES, path, fps=12, prompt=PROMPT, metadata=METADATA)
    return path


def comment_of(path: Path) -> str | None:
    return parse_ffmetadata(dump_ffmetadata(path)).get("comment")


def with_box(path: Path, content: bytes) -> Path:
    """The video with another box in place of its last, which is ours."""
    old = path.read_bytes()
    kind, start, _ = boxes(old)[-1]
    assert kind == b"uuid"
    path.write_bytes(old[:start] + content)
    return path


def packet(inside: str, head: str = "") -> bytes:
    """An XMP packet around an element of ours."""
    text = (
        f'{head}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:m="{xmp.OUR_NAMESPACE}">{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    )
    return text.encode()


def test_tags_that_a_service_has_blanked_are_read_from_the_box(path: Path) -> None:
    blank_tags(path)
    assert comment_of(path) is None
    assert read_metadata(path) == METADATA
    renamed = path.rename(path.with_name("VID-2026 (1).mp4"))
    assert read_metadata(renamed) == METADATA


def test_the_comment_comes_first(path: Path) -> None:
    with_box(path, xmp.box("p", '{"prompt":"another"}'))
    assert read_metadata(path) == METADATA


def test_the_file_plays_as_before_and_from_its_beginning(path: Path) -> None:
    content = path.read_bytes()
    kinds = [kind for kind, _, _ in boxes(content)]
    assert kinds.index(b"moov") < kinds.index(b"mdat") < kinds.index(b"uuid") == len(kinds) - 1
    assert boxes(content)[-1][2] == len(content)
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 7
    assert content.count(UUID) == 1


def test_other_programs_find_the_description_and_that_a_model_made_it(path: Path) -> None:
    with path.open("rb") as file:
        (told,) = xmp.packets(file)
    root = ElementTree.fromstring(told)
    text = "".join(root.itertext())
    assert "<b>bold</b> &" in text
    assert "🎥" in text
    assert "trainedAlgorithmicMedia" in text
    (source,) = root.iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert source.text == ("http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia")
    (item,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
    assert item.text is not None
    assert item.text.startswith('a <b>bold</b> & "quoted" ]]>')


def test_the_longest_request_fits(tmp_path: Path) -> None:
    metadata = {"prompt": "&" * 2000, "negative_prompt": "<" * 2000, "note": "&" * 80_000}
    path = tmp_path / "x.mp4"
    encode.write_video(FRAMES, path, fps=12, prompt="&" * 2000, metadata=metadata)
    blank_tags(path)
    assert read_metadata(path) == metadata


@pytest.mark.parametrize("seed", range(5))
def test_any_prompt_comes_back(tmp_path: Path, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 0x11_0000, 300)
    prompt = "".join(chr(code) for code in codes) + "".join(map(chr, range(0x100)))
    path = tmp_path / "x.mp4"
    encode.write_video(FRAMES, path, fps=12, prompt=prompt, metadata={"prompt": prompt})
    blank_tags(path)
    assert read_metadata(path) == {"prompt": prompt}


OURS = box(b"uuid", UUID + packet('<m:json>{"prompt":"ours"}</m:json>'))

FOUND = {
    "64-bit size": struct.pack(">I4sQ", 1, b"uuid", 8 + len(OURS)) + OURS[8:],
    "to the end": struct.pack(">I4s", 0, b"uuid") + OURS[8:],
    "unknown before": box(b"wxyz", b"?" * 99) + box(b"free", b"") + OURS,
    "another uuid before": box(b"uuid", bytes(16) + b"what") + OURS,
    "another's XMP before": box(b"uuid", UUID + packet("<other/>")) + OURS,
    "broken XMP before": box(b"uuid", UUID + b"<x:xmpmeta") + OURS,
    "too long before": box(b"uuid", UUID + b" " * (xmp.MAX_PACKET_BYTES + 1)) + OURS,
    "as an attribute": box(
        b"uuid",
        UUID
        + packet("").replace(
            b"<rdf:Description ", b'<rdf:Description m:json=\'{"prompt":"ours"}\' '
        ),
    ),
    "in UTF-16": box(
        b"uuid", UUID + packet('<m:json>{"prompt":"ours"}</m:json>').decode().encode("utf-16")
    ),
    "padded": box(b"uuid", OURS[8:] + b"\n" * 2000 + bytes(8)),
    "rubbish behind": OURS + b"\0\0\0",
    "too large a box behind": OURS + struct.pack(">I4s", 0xFFFFFFFF, b"mdat"),
}


@pytest.mark.parametrize("content", FOUND.values(), ids=FOUND)
def test_the_box_is_found_wherever_it_lies(path: Path, content: bytes) -> None:
    blank_tags(path)
    with_box(path, content)
    assert read_metadata(path) == {"prompt": "ours"}


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
)

HOSTILE = {
    "none": b"",
    "bomb": box(b"uuid", UUID + packet("<m:json>&j;</m:json>", BOMB + "]>")),
    "doctype": box(b"uuid", UUID + packet('<m:json>{"a":1}</m:json>', "<!DOCTYPE x>")),
    "outside": box(
        b"uuid",
        UUID + packet("<m:json>&e;</m:json>", '<!DOCTYPE x [<!ENTITY e SYSTEM "/etc/passwd">]>'),
    ),
    "unknown encoding": box(
        b"uuid", UUID + packet("<m:json/>", "<?xml version='1.0' encoding='klingon'?>")
    ),
    "deep": box(b"uuid", UUID + b"<a>" * 100_000),
    "binary": box(b"uuid", UUID + bytes(range(256)) * 40),
    "empty": box(b"uuid", UUID),
    "short": box(b"uuid", UUID[:7]),
    "no room for its size": struct.pack(">I4s", 1, b"uuid"),
    "size below its head": struct.pack(">I4sQ", 1, b"uuid", 3) + UUID,
    "size beyond the file": struct.pack(">I4sQ", 1, b"uuid", 2**63) + UUID,
    "very many": box(b"free", b"") * 20_000 + OURS,
    "no JSON": box(b"uuid", UUID + packet("<m:json>{nothing</m:json>")),
    "an array": box(b"uuid", UUID + packet("<m:json>[1]</m:json>")),
    "deep JSON": box(b"uuid", UUID + packet("<m:json>" + "[" * 100_000 + "</m:json>")),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_ours_is_told_and_does_no_harm(path: Path, content: bytes) -> None:
    blank_tags(path)
    with_box(path, content)
    with pytest.raises(
        MediaError, match=r"^'x\.mp4': .*(no metadata|not metadata of this app|not a whole)"
    ):
        read_metadata(path)


@pytest.mark.parametrize("theirs", ["holiday", '{"their":"own"}', '{"prompt":'])
def test_anothers_comment_does_not_hide_ours(path: Path, theirs: str) -> None:
    content = path.read_bytes()
    _, start, _ = boxes(content)[-1]
    ours = content[start:]
    encode.write_video(FRAMES, path, fps=12, prompt="", metadata={"x" * len(theirs): 1})
    old = f'{{"{"x" * len(theirs)}":1}}'.encode()
    content = path.read_bytes()
    new = theirs.encode().ljust(len(old))
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1)[: boxes(content)[-1][1]] + ours)
    assert (comment_of(path) or "").strip() == theirs
    assert read_metadata(path) == METADATA


async def test_a_restore_believes_either_place(tmp_path: Path) -> None:
    for number in (1, 2):
        made = video(tmp_path, number)
    blank_tags(made)
    assert recovery.restore(tmp_path, Path("videos")).followed.adopted == 2
    found = {number: (job.prompt, job.seed) for number, job in (await kept(tmp_path)).items()}
    assert found == {number: (f"video {number}", 2**32 - number) for number in (1, 2)}


# Posters
def test_a_poster_tells_the_same(tmp_path: Path) -> None:
    encode.save(FRAMES, tmp_path, "job", fps=12, prompt=PROMPT, metadata=METADATA)
    assert read_poster_metadata(tmp_path / "job.webp") == METADATA
    assert read_metadata(tmp_path / "job.mp4") == METADATA
    with Image.open(tmp_path / "job.webp") as image:
        assert image.format == "WEBP"
        assert image.size == (64, 64)


def test_what_is_no_poster_of_ours_is_said(tmp_path: Path) -> None:
    encode.save(FRAMES, tmp_path, "job", fps=12, prompt="p", metadata=METADATA)
    good = (tmp_path / "job.webp").read_bytes()
    plain = Image.fromarray(FRAMES[0])
    plain.save(tmp_path / "bare.webp")
    plain.save(tmp_path / "picture.png")
    for name, comment in {"other": b"ASCII\0\0\0holiday", "unicode": b"UNICODE\0h\0"}.items():
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        plain.save(tmp_path / f"{name}.webp", exif=exif)
    (tmp_path / "torn.webp").write_bytes(good[:20])
    (tmp_path / "text.webp").write_text("not a picture")
    (tmp_path / "broken.webp").write_bytes(
        good.replace(b"II*\0", b"II*\xff").replace(b"MM\0*", b"MM\xff*")
    )
    for name, reason in {
        "missing.webp": "no such file",
        "bare.webp": "no metadata",
        "picture.png": "not a whole WebP",
        "other.webp": "not metadata of this app",
        "unicode.webp": "no metadata",
        "torn.webp": "not a whole WebP",
        "text.webp": "not a whole WebP",
        "broken.webp": "",
    }.items():
        with pytest.raises(MediaError, match=f"^'{name}': .*{reason}"):
            read_poster_metadata(tmp_path / name)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_poster_is_read_or_told(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.webp"
    encode.write_poster(FRAMES[0], path, prompt="p", metadata=METADATA)
    content = bytearray(path.read_bytes())
    exif = content.index(b"EXIF")
    random = np.random.default_rng(seed)
    for place in random.integers(exif, len(content), 8):
        content[place] = random.integers(0, 256)
    path.write_bytes(content)
    with contextlib.suppress(MediaError):
        read_poster_metadata(path)
