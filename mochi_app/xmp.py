"""A second copy of a video's metadata: XMP in its own box at the end of the MP4.

Services that forward videos blank the tags in `moov/udta`, where `engine/encode.py` puts the
request for players to show; a top-level `uuid` box survives. XMP's specification (part 3, storage
in files) puts it there in an MPEG-4, so other programs can read the description, and that a model
made the video. Owns writing and reading the box and the packet in it; no file is trusted.
"""

from __future__ import annotations

import codecs
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import UUID
from xml.parsers import expat
from xml.sax.saxutils import escape

XMP_UUID = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
OUR_NAMESPACE = "urn:mochi-studio:request:1.0#"
PROPERTY = "json"
ASCII_COMMENT = b"ASCII\0\0\0"  # prefix of a user comment in the EXIF of a poster
# From the IPTC's controlled vocabulary: media created entirely by a model.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MAX_PACKET_BYTES = 1 << 20  # read; our 96 KiB of JSON grow at most fivefold by escapes
MAX_BOXES = 10_000  # read; a fragmented file has two per fragment

PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:mochi="{namespace}">
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{prompt}</rdf:li></rdf:Alt></dc:description>
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<mochi:{property}>{request}</mochi:{property}>
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>
"""


class XmpError(ValueError):
    """A packet cannot be read."""


def box(prompt: str, request: str) -> bytes:
    """The box for the end of an MP4. `request` is JSON in ASCII; `prompt` is for other programs,
    without the characters that XML cannot represent."""
    packet = PACKET.format(
        namespace=OUR_NAMESPACE,
        property=PROPERTY,
        source=SOURCE_TYPE,
        prompt=escape(writable(prompt)),
        request=escape(request),
    ).encode("utf-8")
    return struct.pack(">I4s", 24 + len(packet), b"uuid") + XMP_UUID + packet


def writable(text: str) -> str:
    """The text with a space for each character that XML 1.0 does not allow."""
    return "".join(char if may_be_written(ord(char)) else " " for char in text)


def may_be_written(code: int) -> bool:
    """Whether XML 1.0 preserves this character (section 2.2). A carriage return is allowed, but
    every parser turns it into a line feed."""
    return (
        code in (0x9, 0xA)
        or 0x20 <= code <= 0xD7FF
        or 0xE000 <= code <= 0xFFFD
        or 0x10000 <= code <= 0x10FFFF
    )


def read_requests(path: Path) -> Iterator[str]:
    """What this app wrote into the XMP boxes of a file, in order; nothing if it has none, or is not
    an MP4.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        for packet in packets(file):
            try:
                yield from requests_of(packet)
            except XmpError:
                continue


def packets(file: BinaryIO) -> Iterator[bytes]:
    """The XMP packets in the top-level boxes of an MP4 (ISO 14496-12, 4.2), none longer than
    `MAX_PACKET_BYTES`. Stops at a size that exceeds the file."""
    end = file.seek(0, os.SEEK_END)
    start = 0
    for _ in range(MAX_BOXES):
        file.seek(start)
        head = file.read(32)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if size == 1 and len(head) >= 16:  # the size has 64 bits
            header, size = 16, struct.unpack(">Q", head[8:16])[0]
        elif size == 0:  # the rest of the file
            size = end - start
        if size < header or start + size > end:
            return
        uuid, content = head[header : header + 16], header + 16
        if kind == b"uuid" and uuid == XMP_UUID and content <= size <= content + MAX_PACKET_BYTES:
            file.seek(start + content)
            yield file.read(size - content)
        start += size


def requests_of(packet: bytes) -> list[str]:
    """Our property's values in a packet, as elements or attributes, since other programs may have
    rewritten it.

    Raises:
        XmpError: not well-formed XML, or it declares types or entities, which XMP never does and
            which can expand a short text into a long one.
    """
    name = f"{OUR_NAMESPACE} {PROPERTY}"
    found: list[str] = []
    inside: list[str] | None = None

    def begin(element: str, attributes: dict[str, str]) -> None:
        nonlocal inside
        if name in attributes:
            found.append(attributes[name])
        inside = [] if element == name else None

    def end(element: str) -> None:
        nonlocal inside
        if element == name and inside is not None:
            found.append("".join(inside))
        inside = None

    def text(data: str) -> None:
        if inside is not None:
            inside.append(data)

    def refuse(*_: object) -> None:
        raise XmpError("declares a document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        wide = packet.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        parser.Parse(packet if wide else packet.rstrip(b"\0"), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise XmpError(str(error)) from error
    return found


def parse_request(text: str) -> dict[str, object] | None:
    """The JSON object in a text; None if there is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
