"""The small world of the embedded model: one lit shape over a background.

`render(caption, seed)` gives the video, uint8, exactly reproducible. `plan` and `coverage` are its
two halves (where the shape is, how much of each pixel it covers), which training uses without
colours. What can be said about the world is in `words.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mochi_app.tiny.words import COLOR_NAMES, COLORS, MOTIONS, SHAPES, Attributes, parse_caption

Floats: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[np.uint8]

WIDTHS = (0.26, 0.38, 0.52)  # across, as a fraction of the frame: small, plain, big
HOLE = 0.55  # of a ring's outer diameter
TRIANGLE_HEIGHT = 0.866  # of its base: equilateral
LIGHT = 10.0  # added at the top edge and subtracted at the bottom, of 255
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Plan:
    """Where the shape is: centres (T, 2) as (x, y) and widths (T,), of a unit frame."""

    centers: Floats
    widths: Floats

    def window(self, start: int, length: int) -> Plan:
        """The same movement, only frames start to start + length."""
        end = start + length
        return Plan(centers=self.centers[start:end], widths=self.widths[start:end])


def plan(attributes: Attributes, seed: int, num_frames: int) -> Plan:
    """Draw size, place, travel and growth from the seed."""
    random = np.random.default_rng(seed)
    width = WIDTHS[attributes.size] * random.uniform(0.95, 1.05)
    travel = random.uniform(0.4, 0.6)
    growth = random.uniform(1.8, 3.0)
    place = random.uniform(-1.0, 1.0, size=2)
    clock = np.linspace(-0.5, 0.5, num_frames)
    motion = MOTIONS[attributes.motion]
    widths = np.full(num_frames, width)
    path = np.zeros((num_frames, 2))
    if motion.startswith("moving"):
        travel = min(travel, max(0.42, 1.0 - width))
        path = clock[:, None] * travel * np.array(DIRECTIONS[motion.split()[1]])
    elif motion != "standing still":
        growth = min(growth, (0.88 / width) ** 2)
        sign = 1.0 if motion == "growing" else -1.0
        widths = width * growth ** (sign * clock)
    extent = np.abs(path).max(axis=0) + widths.max() / 2
    room = np.maximum(0.02, 0.9 * (0.5 - extent))
    centers = 0.5 + path + place * room
    return Plan(centers=centers.astype(np.float32), widths=widths.astype(np.float32))


def coverage(plan: Plan, shape: int, height: int, width: int) -> Floats:
    """How much of each pixel the shape covers, anti-aliased over one pixel: (T, H, W) in [0, 1]."""
    unit = float(min(height, width))
    rows = np.arange(height, dtype=np.float32) + 0.5
    columns = np.arange(width, dtype=np.float32) + 0.5
    y = rows[None, :, None] - plan.centers[:, 1, None, None] * height
    x = columns[None, None, :] - plan.centers[:, 0, None, None] * width
    distance = _distance(SHAPES[shape], x, y, plan.widths[:, None, None] * unit)
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0), dtype=np.float32)


def _distance(shape: str, x: Floats, y: Floats, across: Floats) -> Floats:
    """Signed distance to the shape's edge in pixels, negative inside."""
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - across / 2, dtype=np.float32)
    if shape == "triangle":
        tall = TRIANGLE_HEIGHT * across
        slope = np.sqrt(tall**2 + (across / 2) ** 2)
        sides = (np.abs(x) * tall - (y + tall / 2) * across / 2) / slope
        return np.asarray(np.maximum(sides, y - tall / 2), dtype=np.float32)
    radius = np.sqrt(x * x + y * y)
    if shape == "ring":
        middle, half = across * (1 + HOLE) / 4, across * (1 - HOLE) / 4
        return np.asarray(np.abs(radius - middle) - half, dtype=np.float32)
    return np.asarray(radius - across / 2, dtype=np.float32)


def light(height: int) -> Floats:
    """What is added to every pixel of a row, of 255: positive at the top. Shape (H,)."""
    rows = (np.arange(height, dtype=np.float32) + 0.5) / height
    return np.asarray(LIGHT * (1.0 - 2.0 * rows), dtype=np.float32)


def paint(covered: Floats, color: int, background: int) -> Pixels:
    """Colour a coverage (T, H, W): uint8 (T, H, W, 3)."""
    front = np.array(COLORS[COLOR_NAMES[color]], dtype=np.float32)
    back = np.array(COLORS[COLOR_NAMES[background]], dtype=np.float32)
    video = (
        back + covered[..., None] * (front - back) + light(covered.shape[1])[None, :, None, None]
    )
    return np.asarray(np.clip(np.rint(video), 0, 255), dtype=np.uint8)


def render_attributes(
    attributes: Attributes, seed: int, *, height: int = 96, width: int = 96, num_frames: int = 31
) -> Pixels:
    """The video of these attributes: uint8 (T, H, W, 3)."""
    path = plan(attributes, seed, num_frames)
    covered = coverage(path, attributes.shape, height, width)
    return paint(covered, attributes.color, attributes.background)


def render(
    caption: str, seed: int, *, height: int = 96, width: int = 96, num_frames: int = 31
) -> Pixels:
    """The video of a caption: uint8 (T, H, W, 3). ValueError if it does not describe this world."""
    attributes = parse_caption(caption)
    return render_attributes(attributes, seed, height=height, width=width, num_frames=num_frames)
