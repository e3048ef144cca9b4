"""Videos as the engine writes them, and what others do to them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from mochi_app.engine import encode
from tests.histories import job_id

FRAMES = np.zeros((7, 64, 64, 3), np.uint8)


def video(data: Path, number: int, folder: str = "videos", **metadata: Any) -> Path:
    """A finished video as the engine leaves it, which tells of its job."""
    name = job_id(number)
    facts = {
        "job_id": name,
        "kind": "preview",
        "parent_id": None,
        "prompt": f"video {number}",
        "negative_prompt": "dull",
        "seed": 2**32 - number,
        "num_inference_steps": 8,
        "guidance_scale": 4.5,
        "height": 64,
        "width": 96,
        "num_frames": 7,
        "fps": 12,
        "schedule": "linear_quadratic",
        "lora": None,
        "lora_scale": 1.0,
        "model": "tiny-mochi",
        "version": "1",
    }
    path = data / folder / f"{name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.zeros((7, 64, 96, 3), dtype=np.uint8)
    encode.write_video(frames, path, fps=12, prompt="", metadata=facts | metadata)
    return path


def boxes(
    content: bytes | bytearray, start: int = 0, end: int | None = None
) -> list[tuple[bytes, int, int]]:
    """Kind, start and end of the boxes in a range; sizes of 32 bits."""
    found = []
    while start < (len(content) if end is None else end):
        size, kind = struct.unpack(">I4s", content[start : start + 8])
        found.append((kind, start, start + size))
        start += size
    return found


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def blank_tags(path: Path) -> None:
    """What a chat service was seen to do: the children of moov/udta become `skip`, all zeros."""
    content = bytearray(path.read_bytes())
    (moov,) = [b for b in boxes(content) if b[0] == b"moov"]
    (udta,) = [b for b in boxes(content, moov[1] + 8, moov[2]) if b[0] == b"udta"]
    for _, start, end in boxes(content, udta[1] + 8, udta[2]):
        content[start + 4 : end] = b"skip" + bytes(end - start - 8)
    path.write_bytes(content)
