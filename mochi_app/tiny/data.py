"""Training data of the embedded model, a pure function of (seed, step): any run can be repeated.

The decoder sees rendered clips. The transformer sees only latents, and those are linear in the
shape's coverage: latent = B * moments(1) + (F - B) * moments(coverage) + moments(light). So a bank
of coverage moments is rendered once (`geometry_bank`), and colours are mixed in for each batch at
next to no cost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mochi_app.tiny import latents, words, world
from mochi_app.tiny.words import Attributes

TRAINING_SEEDS = 1_000_000  # evaluation uses seeds below
EMPTY_CAPTIONS = 0.1
PARTIAL_CAPTIONS = 0.06
USUAL_SIGNAL = 0.45  # root mean square contrast, of 2, × width: a large shape in clear colours
RING_LINE = 0.6  # a ring's line is thin: its hole closes where a disc of its width is safe
MAX_WEIGHT = 4.0
MIRROR = {"moving left": "moving right", "moving right": "moving left"}


def step_random(seed: int, stage: str, step: int) -> np.random.Generator:
    """The generator for the batch of this step, independent of earlier steps."""
    return np.random.default_rng([seed, *stage.encode(), step])


def palette() -> torch.Tensor:
    """The world's colours in [-1, 1], shape (8, 3)."""
    return torch.tensor(list(words.COLORS.values()), dtype=torch.float32) / 127.5 - 1.0


def clips(random: np.random.Generator, batch: int, num_frames: int) -> torch.Tensor:
    """Rendered training clips in [-1, 1], (B, 3, T, 96, 96), from anywhere in their videos."""
    videos = []
    for _ in range(batch):
        attributes = words.training_attributes(random)
        seed = TRAINING_SEEDS + int(random.integers(2**31))
        path = world.plan(attributes, seed, 31)
        path = path.window(int(random.integers(31 - num_frames + 1)), num_frames)
        covered = world.coverage(path, attributes.shape, 96, 96)
        videos.append(world.paint(covered, attributes.color, attributes.background))
    stacked = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3)
    return stacked.float() / 127.5 - 1.0


def geometry_bank(path: Path, per_class: int, seed: int = 0) -> torch.Tensor:
    """Coverage moments, float16 (shape 4, motion 7, size 3, N, 4, 6, 12, 12), rendered once."""
    if path.exists():
        return load_file(path)["moments"]
    bank = torch.empty((4, 7, 3, per_class, 4, 6, 12, 12), dtype=torch.float16)
    for shape in range(4):
        for motion in range(7):
            for size in range(3):
                attributes = Attributes(0, 1, shape, motion, size)
                base = TRAINING_SEEDS + per_class * (seed * 84 + (shape * 7 + motion) * 3 + size)
                covered = np.stack(
                    [
                        world.coverage(world.plan(attributes, base + i, 31), shape, 96, 96)
                        for i in range(per_class)
                    ]
                )
                bank[shape, motion, size] = latents.block_moments(torch.from_numpy(covered)).half()
    staging = path.with_suffix(f".{os.getpid()}.new")
    save_file({"moments": bank}, staging)
    staging.replace(path)
    return bank


@dataclass(frozen=True)
class LatentBatch:
    """Normalised latents (B, 12, 6, 12, 12), their captions, and the loss weight of each (B,)."""

    latents: torch.Tensor
    captions: list[str]
    weights: torch.Tensor


class LatentSource:
    """Batches of latents and captions for the transformer."""

    def __init__(self, bank: torch.Tensor) -> None:
        self.bank = bank
        ones = torch.ones(1, 31, 96, 96)
        self.ones = latents.block_moments(ones)[0]
        shade = torch.from_numpy(world.light(96)).view(1, 1, 96, 1).expand(1, 31, 96, 96) / 127.5
        self.shade = latents.block_moments(shade.contiguous())[0]
        self.palette = palette()

    def batch(self, random: np.random.Generator, size: int) -> LatentBatch:
        """A batch; some captions are empty, as guidance needs, or incomplete."""
        chosen = [words.training_attributes(random) for _ in range(size)]
        moments = torch.stack([self._moments(attributes, random) for attributes in chosen])
        captions = [self._caption(attributes, random) for attributes in chosen]
        weights = [self.weight(*pair) for pair in zip(chosen, captions, strict=True)]
        return LatentBatch(self.colour(moments, chosen), captions, torch.tensor(weights))

    def _moments(self, attributes: Attributes, random: np.random.Generator) -> torch.Tensor:
        """Moments of one coverage (4, 6, 12, 12), mirrored half of the time."""
        index = int(random.integers(self.bank.shape[3]))
        if random.random() < 0.5:
            return self.bank[attributes.shape, attributes.motion, attributes.size, index].float()
        motion = words.MOTIONS[attributes.motion]
        twin = words.MOTIONS.index(MIRROR.get(motion, motion))
        moments = self.bank[attributes.shape, twin, attributes.size, index].float().flip(-1)
        return moments * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1, 1)

    def weight(self, attributes: Attributes, caption: str) -> float:
        """More for small shapes and for similar colours, which a plain mean neglects.

        It depends on the caption alone. A weight that depends on the picture, such as more for the
        cells of the shape, shifts the mean that the model learns: while several places are still
        possible it draws some of each, which yields two copies or a rectangle.
        """
        try:
            words.parse_caption(caption)
        except ValueError:  # it does not give size and colours
            return 1.0
        contrast = self.palette[attributes.color] - self.palette[attributes.background]
        line = world.WIDTHS[attributes.size]
        if words.SHAPES[attributes.shape] == "ring":
            line *= RING_LINE
        signal = float(contrast.square().mean().sqrt()) * line
        return min(MAX_WEIGHT, max(1.0, USUAL_SIGNAL / signal))

    @staticmethod
    def _caption(attributes: Attributes, random: np.random.Generator) -> str:
        lot = random.random()
        if lot < EMPTY_CAPTIONS:
            return ""
        if lot < EMPTY_CAPTIONS + PARTIAL_CAPTIONS:
            return words.partial_caption(attributes, random)
        return words.random_caption(attributes, random)

    def colour(self, moments: torch.Tensor, chosen: Sequence[Attributes]) -> torch.Tensor:
        """Mix colours into coverage moments: (B, 4, ...) to normalised latents (B, 12, ...)."""
        front = self.palette[[a.color for a in chosen]]
        back = self.palette[[a.background for a in chosen]]
        mixed = (
            torch.einsum("bc,fthw->bfcthw", back, self.ones)
            + torch.einsum("bc,bfthw->bfcthw", front - back, moments)
            + self.shade[None, :, None]
        )
        return latents.normalise(mixed.flatten(1, 2))
