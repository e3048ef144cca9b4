"""Read what a video shows, and report how well the embedded model follows its captions.

`read_video` is plain geometry, nothing is learned: the border gives the background, the pixels
furthest from it the colour, each pixel's share between the two a soft mask; its centroid and area
over time give the motion, and the template that overlaps the mask best gives the shape. Run a
report with::

    python -m mochi_app.tiny.judge --model assets/tiny-mochi --captions 200 --seed 0
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MochiPipeline
from PIL import Image

from mochi_app.tiny import words, world
from mochi_app.tiny.words import Attributes
from mochi_app.tiny.world import Floats, Pixels

logger = logging.getLogger(__name__)

ATTRIBUTES = ("background", "color", "motion", "shape", "size")
AREA = np.array([np.pi / 4, 1.0, world.TRIANGLE_HEIGHT / 2, np.pi / 4 * (1 - world.HOLE**2)])
TRAVEL = 0.15  # of the frame: less is no movement
GROWTH = 1.25  # ratio of the widths at the end and at the start
FOREGROUND = 0.02  # minimum share of the frame that a shape covers
CAPTION_TOKENS = 32


def palette() -> Floats:
    """The world's colours, (8, 3) of 255."""
    return np.array(list(words.COLORS.values()), dtype=np.float32)


def read_background(unlit: Floats) -> int:
    """The palette colour nearest to most border pixels of (T, H, W, 3)."""
    edge = np.concatenate(
        [
            part.reshape(-1, 3)
            for part in (unlit[:, :3], unlit[:, -3:], unlit[:, :, :3], unlit[:, :, -3:])
        ]
    )
    distance = np.square(edge[:, None] - palette()).sum(-1)
    return int(np.bincount(distance.argmin(1), minlength=8).argmax())


def read_color(unlit: Floats, background: int) -> int:
    """The palette colour nearest to the pixels that differ most from the background."""
    difference = np.sqrt(np.square(unlit - palette()[background]).sum(-1))
    count = max(1, int(FOREGROUND / 2 * difference.shape[1] * difference.shape[2]))
    ranked = np.sort(difference.reshape(len(difference), -1), axis=1)
    strong = difference >= 0.9 * ranked[:, -count, None, None]
    color = np.median(unlit[strong], axis=0)
    distance = np.square(color - palette()).sum(-1)
    distance[background] = np.inf
    return int(distance.argmin())


def soft_mask(unlit: Floats, color: int, background: int) -> Floats:
    """Each pixel's position between background (0) and colour (1): (T, H, W)."""
    way = palette()[color] - palette()[background]
    share = (unlit - palette()[background]) @ way / np.dot(way, way)
    # faint stains far from the shape would pull on its centroid
    return np.asarray(np.clip((share - 0.15) / 0.7, 0.0, 1.0), dtype=np.float32)


@dataclass(frozen=True)
class Track:
    """The mask's centroid (T, 2) as (x, y), area (T,) in pixels, and which frames show it whole."""

    centers: Floats
    areas: Floats
    whole: np.ndarray[Any, np.dtype[np.bool_]]


def track(mask: Floats) -> Track:
    """Follow the mask through the frames."""
    _, height, width = mask.shape
    area = np.maximum(mask.sum((1, 2)), 1e-3)
    x = (mask.sum(1) * (np.arange(width) + 0.5)).sum(1) / area
    y = (mask.sum(2) * (np.arange(height) + 0.5)).sum(1) / area
    edge = [mask[:, 0].max(1), mask[:, -1].max(1), mask[:, :, 0].max(1), mask[:, :, -1].max(1)]
    whole = (np.max(edge, axis=0) < 0.5) & (area > FOREGROUND * height * width / 2)
    centers = np.stack([x, y], axis=1).astype(np.float32)
    return Track(centers, area.astype(np.float32), whole if whole.any() else np.ones_like(whole))


def read_motion(path: Track, side: int) -> int:
    """Movement from a line fit of the centroid, growth from one of the area; frames that cut the
    shape off count less."""
    clock = np.linspace(-0.5, 0.5, len(path.areas))
    weight = np.where(path.whole, 1.0, 0.3)
    travel_x, travel_y = (
        np.polyfit(clock, path.centers[:, axis], 1, w=weight)[0] / side for axis in (0, 1)
    )
    growth = np.exp(np.polyfit(clock, 0.5 * np.log(path.areas), 1, w=weight)[0])
    if max(abs(travel_x), abs(travel_y)) > TRAVEL:
        if abs(travel_x) > abs(travel_y):
            name = "moving right" if travel_x > 0 else "moving left"
        else:
            name = "moving down" if travel_y > 0 else "moving up"
    elif growth > GROWTH:
        name = "growing"
    elif growth < 1 / GROWTH:
        name = "shrinking"
    else:
        name = "standing still"
    return words.MOTIONS.index(name)


def read_shape(mask: Floats, path: Track) -> int:
    """The shape whose template of equal area and centroid overlaps the mask best."""
    frames = np.flatnonzero(path.whole)
    frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), 12)).astype(int)]
    overlaps = []
    for shape in range(len(words.SHAPES)):
        across = np.sqrt(path.areas[frames] / AREA[shape])
        centers = path.centers[frames].copy()
        if words.SHAPES[shape] == "triangle":  # its centroid is a sixth of its height too low
            centers[:, 1] -= across * world.TRIANGLE_HEIGHT / 6
        _, height, width = mask.shape
        plan = world.Plan(
            centers=(centers / np.array([width, height])).astype(np.float32),
            widths=(across / min(height, width)).astype(np.float32),
        )
        template = world.coverage(plan, shape, height, width)
        both = np.minimum(template, mask[frames]).sum((1, 2))
        either = np.maximum(template, mask[frames]).sum((1, 2))
        overlaps.append(float(np.mean(both / np.maximum(either, 1e-3))))
    return int(np.argmax(overlaps))


def read_size(path: Track, shape: int, side: int) -> int:
    """The nearest of the three widths, by the video's mean width (growth is centred on it)."""
    across = np.sqrt(path.areas[path.whole] / AREA[shape]) / side
    width = float(np.exp(np.mean(np.log(across))))
    return int(np.argmin(np.abs(np.log(np.array(world.WIDTHS) / width))))


def read_video(video: Pixels) -> Attributes:
    """What uint8 frames (T, H, W, 3) show."""
    unlit = video.astype(np.float32) - world.light(video.shape[1])[None, :, None, None]
    background = read_background(unlit)
    color = read_color(unlit, background)
    mask = soft_mask(unlit, color, background)
    path = track(mask)
    side = min(video.shape[1:3])
    shape = read_shape(mask, path)
    return Attributes(
        color=color,
        background=background,
        shape=shape,
        motion=read_motion(path, side),
        size=read_size(path, shape, side),
    )


def accuracies(truth: Sequence[Attributes], seen: Sequence[Attributes]) -> dict[str, float]:
    """Share correct of each attribute, and of two, three and four together (without size)."""
    right = {
        name: np.array(
            [getattr(a, name) == getattr(b, name) for a, b in zip(truth, seen, strict=True)]
        )
        for name in ATTRIBUTES
    }
    result = {name: float(values.mean()) for name, values in right.items()}
    scene = right["background"] & right["color"]
    result["background+color"] = float(scene.mean())
    result["background+color+motion"] = float((scene & right["motion"]).mean())
    result["all four"] = float((scene & right["motion"] & right["shape"]).mean())
    return result


def to_pixels(frames: Any) -> Pixels:
    """Pipeline output with output_type "np", (T, H, W, 3) in [0, 1], as uint8."""
    return np.asarray(np.rint(np.asarray(frames) * 255.0), dtype=np.uint8)


def generate(
    pipeline: MochiPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    **options: Any,
) -> list[Pixels]:
    """Generate the prompts' videos, each from its own seed, in batches of ten."""
    videos: list[Pixels] = []
    for first in range(0, len(prompts), 10):
        part = slice(first, first + 10)
        frames = pipeline(
            list(prompts[part]),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            output_type="np",
            max_sequence_length=CAPTION_TOKENS,  # padding is masked: shorter is only faster
            **options,
        ).frames
        videos.extend(to_pixels(video) for video in frames)
    return videos


def reconstruct(pipeline: MochiPipeline, video: Pixels) -> Pixels:
    """The video after encoding and decoding."""
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    frames = (decoded[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    return to_pixels(frames.numpy())


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(first.astype(np.float64) - second.astype(np.float64)).mean()
    return float(10 * np.log10(255.0**2 / max(error, 1e-9)))


def vae_report(pipeline: MochiPipeline, truth: Sequence[Attributes], seed: int) -> dict[str, float]:
    """Accuracy and PSNR of rendered videos that only went through the VAE."""
    originals = [world.render_attributes(item, seed + i) for i, item in enumerate(truth)]
    decoded = [reconstruct(pipeline, video) for video in originals]
    result = accuracies(truth, [read_video(video) for video in decoded])
    result["psnr"] = float(np.mean([psnr(a, b) for a, b in zip(originals, decoded, strict=True)]))
    return result


def held_out(count: int, seed: int) -> list[Attributes]:
    """Attributes of captions that training never saw together."""
    random = np.random.default_rng([seed, 5])
    return [words.held_out_attributes(random) for _ in range(count)]


def report(
    pipeline: MochiPipeline, count: int, seed: int, steps: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
    """Figures of the model on held-out captions at each step count, and of the VAE alone."""
    truth = held_out(count, seed)
    prompts = [words.caption_of(item) for item in truth]
    seeds = [seed * 100_000 + i for i in range(count)]
    result: dict[str, Any] = {"captions": count, "seed": seed, **options}
    result["vae"] = vae_report(pipeline, truth, seed * 1000)
    logger.info("vae %s", json.dumps(result["vae"]))
    videos: dict[int, list[Pixels]] = {}
    for number in steps:
        began = time.monotonic()
        videos[number] = generate(pipeline, prompts, seeds, number, **options)
        figures = accuracies(truth, [read_video(video) for video in videos[number]])
        figures["seconds"] = round(time.monotonic() - began, 1)
        result[f"steps {number}"] = figures
        logger.info("steps %d %s", number, json.dumps(figures))
    if 8 in videos and 64 in videos:
        pairs = zip(videos[8], videos[64], strict=True)
        result["preview to enhance psnr"] = float(np.mean([psnr(a, b) for a, b in pairs]))
    return result


def sheet_prompts() -> Iterator[str]:
    """Sixteen held-out prompts for the contact sheet: every shape with every motion's kind."""
    random = np.random.default_rng(16)
    for index in range(16):
        while True:
            item = words.held_out_attributes(random)
            if item.shape == index % 4 and item.motion == index % 7:
                yield words.caption_of(item)
                break


def contact_sheet(rows: Sequence[Sequence[Pixels]], frames: Sequence[int]) -> Image.Image:
    """One row per prompt: these frames of each of its videos, side by side."""
    gap = 4
    strips = []
    for videos in rows:
        cells = [np.concatenate([video[i] for i in frames], axis=1) for video in videos]
        line = np.full((cells[0].shape[0], gap, 3), 128, dtype=np.uint8)
        joined = [part for cell in cells for part in (cell, line)][:-1]
        strips.append(np.concatenate(joined, axis=1))
    line = np.full((gap, strips[0].shape[1], 3), 128, dtype=np.uint8)
    parts = [part for strip in strips for part in (strip, line)][:-1]
    return Image.fromarray(np.concatenate(parts, axis=0))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Judge the embedded model on held-out captions.")
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-mochi"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--report", type=Path, default=None, help="write the figures as JSON")
    parser.add_argument("--sheet", type=Path, default=None, help="write a contact sheet as PNG")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    defaults = json.loads((arguments.model / "mochi_defaults.json").read_text(encoding="utf-8"))
    options = {key: defaults[key] for key in ("height", "width", "num_frames", "guidance_scale")}
    if arguments.guidance is not None:
        options["guidance_scale"] = arguments.guidance
    pipeline = MochiPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.sheet is not None:
        prompts = list(sheet_prompts())
        seeds = list(range(len(prompts)))
        previews = generate(pipeline, prompts, seeds, 8, **options)
        enhanced = generate(pipeline, prompts, seeds, 64, **options)
        rows = list(zip(previews, enhanced, strict=True))
        contact_sheet(rows, (0, 10, 20, 30)).save(arguments.sheet)
        logger.info("%s", "\n".join(prompts))
    if arguments.captions:
        figures = report(pipeline, arguments.captions, arguments.seed, arguments.steps, options)
        text = json.dumps(figures, indent=2) + "\n"
        if arguments.report is not None:
            arguments.report.write_text(text, encoding="utf-8")
        logger.info("%s", text)


if __name__ == "__main__":
    main()
