"""Draw loss curves with Pillow: one logarithmic panel per stage, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Curve = Sequence[tuple[int, float]]

PANEL = (360, 240)
MARGIN = 36
INK = (40, 40, 40)
LINE = (50, 80, 220)


def draw_curves(curves: Mapping[str, Curve]) -> Image.Image:
    """One panel for each stage that has a curve of (step, loss)."""
    drawn = {name: curve for name, curve in curves.items() if len(curve) > 1}
    image = Image.new("RGB", (PANEL[0] * max(1, len(drawn)), PANEL[1]), (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    for index, (name, curve) in enumerate(drawn.items()):
        _draw_panel(canvas, index * PANEL[0], name, curve)
    return image


def _draw_panel(canvas: ImageDraw.ImageDraw, left: int, name: str, curve: Curve) -> None:
    low = math.log10(min(max(loss, 1e-6) for _, loss in curve))
    high = math.log10(max(max(loss, 1e-6) for _, loss in curve))
    last = max(step for step, _ in curve)
    width, height = PANEL[0] - 2 * MARGIN, PANEL[1] - 2 * MARGIN

    def place(step: float, level: float) -> tuple[float, float]:
        share = (level - low) / max(high - low, 1e-9)
        return left + MARGIN + width * step / last, MARGIN + height * (1 - share)

    canvas.rectangle((place(0, high), place(last, low)), outline=INK)
    points = [place(step, math.log10(max(loss, 1e-6))) for step, loss in curve]
    canvas.line(points, fill=LINE, width=2)
    final = curve[-1][1]
    canvas.text((left + MARGIN, 8), f"{name}: loss {final:.4g} after {last} steps", fill=INK)
    canvas.text((left + MARGIN, MARGIN + height + 6), "0", fill=INK)
    canvas.text((left + MARGIN + width - 30, MARGIN + height + 6), str(last), fill=INK)
    for level in (high, low):
        canvas.text((left + 2, place(0, level)[1] - 5), f"{10**level:.2g}", fill=INK)
