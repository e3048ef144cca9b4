"""Decodes by tiles, alone and over ranks: the work that tests on CPUs and on GPUs share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch.multiprocessing.reductions import StorageWeakRef

from mochi_app.engine.decode import Tile, decode, plan_tiles
from mochi_app.engine.group import Ranks
from tests.places import TINY

SMALL = (32, 32, 24, 24)  # tile height and width, stride height and width, in pixels


@dataclass(frozen=True, slots=True)
class Case:
    """Latents (1, 12, *size) and how the VAE is set to decode them."""

    size: tuple[int, int, int]
    tiling: tuple[int, int, int, int] = SMALL
    tiled: bool = True
    framewise: bool = False
    keep_all_frames: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def latents(self) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(sum(self.size))
        return torch.randn((1, 12, *self.size), generator=generator).to(self.dtype)

    def vae(self) -> AutoencoderKLMochi:
        vae = AutoencoderKLMochi.from_pretrained(TINY, subfolder="vae", dtype=self.dtype)
        vae.enable_tiling(*self.tiling)
        vae.use_tiling = self.tiled
        if self.framewise:
            enable_framewise_decoding(vae)
        vae.drop_last_temporal_frames = not self.keep_all_frames
        return vae


def enable_framewise_decoding(vae: AutoencoderKLMochi) -> None:
    """What the library's method of this name should do: it leaves the convolutions unpadded."""
    vae._enable_framewise_decoding()
    for module in vae.modules():
        if isinstance(module, CogVideoXCausalConv3d):
            module.conv.padding = module.const_padding_conv3d


CASES = {
    "six tiles": Case((2, 6, 9)),
    "six tiles, bfloat16": Case((2, 6, 9), dtype=torch.bfloat16),
    "six tiles, frame by frame": Case((3, 6, 9), framewise=True),
    "six tiles, all frames kept": Case((2, 6, 9), keep_all_frames=True),
    "six tiles, larger": Case((1, 12, 18), tiling=(64, 64, 48, 48)),
    "two tiles": Case((2, 3, 5)),
    "three tiles": Case((1, 8, 3)),
    "five tiles": Case((1, 3, 13)),
    "twelve tiles, strides of no whole cell": Case((1, 8, 12), tiling=(40, 32, 28, 26)),
    "whole, small enough": Case((2, 4, 4)),
    "whole, frame by frame": Case((3, 4, 4), framewise=True),
    "whole, no tiling": Case((2, 6, 9), tiled=False),
    "whole, bfloat16": Case((2, 4, 4), dtype=torch.bfloat16),
}

COUNTS = {name: 6 if name.startswith("six") else 1 for name in CASES} | {
    "two tiles": 2, "three tiles": 3, "five tiles": 5, "twelve tiles, strides of no whole cell": 12,
}  # fmt: skip

# the ranks that decode; a rank's number in its group need not be its number among all
GROUPS = {"two": [2, 3], "three": [1, 2, 3], "four": [0, 1, 2, 3]}


class Cancelled(Exception):
    """What a `between` raises that all ranks agree on."""


def ignore(done: int, total: int) -> None:
    """A between that nobody listens to."""


@dataclass
class Outcome:
    """What one rank saw of one decode: all calls of its between, and its sample if any."""

    calls: list[tuple[int, int]]
    sample: torch.Tensor | None = None
    cancelled: bool = False


def decode_until(
    vae: AutoencoderKLMochi,
    latents: torch.Tensor,
    group: dist.ProcessGroup | None,
    last: int | None = None,
) -> Outcome:
    """Decode; cancel in call number `last` of between, if given."""
    outcome = Outcome([])

    def between(done: int, total: int) -> None:
        outcome.calls.append((done, total))
        if last is not None and len(outcome.calls) > last:
            raise Cancelled

    try:
        outcome.sample = decode(vae, latents, group, between)
    except Cancelled:
        outcome.cancelled = True
    return outcome


def all_work(ranks: Ranks) -> dict[tuple[str, str], Any]:
    """All that one of four processes has to do, in each of the groups that it is in."""
    groups = {name: dist.new_group(members) for name, members in GROUPS.items()}
    found: dict[tuple[str, str], Any] = {}
    for name, members in GROUPS.items():
        group = groups[name]
        if ranks.rank in members:
            for case in CASES:
                found[name, case] = decode_until(CASES[case].vae(), CASES[case].latents, group)
            found[name, "cancels"] = cancels(CASES["five tiles"], group, len(members))
            found[name, "memory"] = most_at_once(CASES["six tiles"], group)
        else:
            found[name, "outside"] = outsider(group)
    return found


def cancels(case: Case, group: Any, size: int) -> list[tuple[Outcome, Outcome]]:
    """A cancel in each call of between, and the decode after it over the same group."""
    vae, latents = case.vae(), case.latents
    calls = 1 + len(plan_tiles(vae, latents.shape).rounds(size))
    return [
        (decode_until(vae, latents, group, last), decode_until(vae, latents, group))
        for last in range(calls)
    ]


def most_at_once(case: Case, group: Any) -> int:
    """How many decoded tiles this rank held at once, when it began to decode another."""
    vae, latents = case.vae(), case.latents
    held: list[int] = []
    alive: list[Any] = []

    def count(*_: Any) -> None:
        held.append(sum(not reference.expired() for reference in alive))

    def remember(_: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        alive.append(StorageWeakRef(output[0].untyped_storage()))  # type: ignore[no-untyped-call]

    vae.decoder.register_forward_pre_hook(count)
    vae.decoder.register_forward_hook(remember)
    decode(vae, latents, group, ignore)
    return max(held)


def outsider(group: Any) -> str:
    """What a process hears that is not in the group."""
    case = CASES["six tiles"]
    try:
        decode(case.vae(), case.latents, group, ignore)
    except ValueError as error:
        return str(error)
    return "nothing"


@cache
def whole(name: str) -> torch.Tensor:
    """What the library decodes, in this process."""
    with torch.no_grad():
        sample: torch.Tensor = CASES[name].vae().decode(CASES[name].latents, return_dict=False)[0]
    return sample


def in_group(found: list[dict[tuple[str, str], Any]], group: str, what: str) -> list[Any]:
    """What the ranks of a group found, by their number in it."""
    return [found[rank][group, what] for rank in GROUPS[group]]


def calls_expected(total: int, ranks: int) -> list[tuple[int, int]]:
    return [(done, total) for done in [*range(0, total, ranks), total]]


def area(tile: Tile) -> int:
    return tile.height * tile.width
