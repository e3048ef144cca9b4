"""What a video tells of itself, a second time: as XMP in a box of its own at the end of the MP4.

Services that pass videos on blank the tags in `moov/udta`, where `engine/encode.py` puts the
request for players to see; a top-level `uuid` box comes back as it was. Such a box is where XMP's
specification (part 3, storage in files) has it in an MPEG-4: other programs read the description,
and that the video is a model's work. Owns the box, the packet in it and their reading; nothing here
trusts a file.
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
ASCII_COMMENT = b"ASCII\0\0\0"  # begins a user comment in the EXIF of a poster
# From the controlled vocabulary of the IPTC: what a model made from scratch.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MAX_PACKET_BYTES = 1 << 20  # read; of ours, 96 KiB of JSON grow at most fivefold by escapes
MAX_BOXES = 10_000  # looked at; a file that is streamed in pieces has two for each

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
    """A packet is not one that can be read."""


def box(prompt: str, request: str) -> bytes:
    """The box for the end of an MP4. `request` is JSON in ASCII; `prompt` is for other programs,
    and loses what XML has no way to write."""
    packet = PACKET.format(
        namespace=OUR_NAMESPACE,
        property=PROPERTY,
        source=SOURCE_TYPE,
        prompt=escape(writable(prompt)),
        request=escape(request),
    ).encode("utf-8")
    return struct.pack(">I4s", 24 + len(packet), b"uuid") + XMP_UUID + packet


def writable(text: str) -> str:
    """The text with a blank for each character that XML 1.0 cannot have."""
    return "".join(char if may_be_written(ord(char)) else " " for char in text)


def may_be_written(code: int) -> bool:
    """Whether XML 1.0 has this character (section 2.2). A carriage return it has, but every parser
    makes a line feed of it."""
    return (
        code in (0x9, 0xA)
        or 0x20 <= code <= 0xD7FF
        or 0xE000 <= code <= 0xFFFD
        or 0x10000 <= code <= 0x10FFFF
    )


def read_requests(path: Path) -> Iterator[str]:
    """What this app left in the XMP boxes of a file, in their order; nothing where a file has none,
    or is no MP4.

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
    `MAX_PACKET_BYTES`. Sizes are believed only as far as the file goes."""
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
    """Our property's values in a packet, be they elements or attributes, as other programs may have
    written them anew.

    Raises:
        XmpError: it is no well-formed XML, or declares types or entities, which no XMP does and
            which can make a short text a long one.
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
    """The JSON object in a text, None where there is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
