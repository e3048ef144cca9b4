"""Tiles dealt over ranks decode to what one process decodes: real processes, the embedded VAE."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch.multiprocessing.reductions import StorageWeakRef

from mochi_app.engine.decode import Tile, decode, plan_tiles
from mochi_app.engine.group import Ranks
from tests.ranks import run_ranks

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-mochi"
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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """As the ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def whole(name: str) -> torch.Tensor:
    """What the library decodes, in this process."""
    with torch.no_grad():
        sample: torch.Tensor = CASES[name].vae().decode(CASES[name].latents, return_dict=False)[0]
    return sample


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each of four processes found."""
    return run_ranks(4, all_work, tmp_path_factory.mktemp("ranks"))


def in_group(found: list[dict[tuple[str, str], Any]], group: str, what: str) -> list[Any]:
    """What the ranks of a group found, by their number in it."""
    return [found[rank][group, what] for rank in GROUPS[group]]


def calls_expected(total: int, ranks: int) -> list[tuple[int, int]]:
    return [(done, total) for done in [*range(0, total, ranks), total]]


# over several ranks


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", CASES)
def test_the_ranks_of_a_group_decode_what_one_process_decodes(
    found: list[dict[tuple[str, str], Any]], group: str, name: str
) -> None:
    first, *others = in_group(found, group, name)
    assert first.sample.dtype == CASES[name].dtype
    assert torch.equal(first.sample, whole(name))
    assert all(other.sample is None for other in others)
    for outcome in (first, *others):
        assert outcome.calls == calls_expected(COUNTS[name], len(GROUPS[group]))


@pytest.mark.parametrize("group", GROUPS)
def test_a_cancel_between_rounds_leaves_the_group_usable(
    found: list[dict[tuple[str, str], Any]], group: str
) -> None:
    calls = calls_expected(5, len(GROUPS[group]))
    for rank, rounds in enumerate(in_group(found, group, "cancels")):
        assert len(rounds) == len(calls)
        for last, (cancelled, after) in enumerate(rounds):
            assert cancelled.cancelled
            assert cancelled.calls == calls[: last + 1]
            assert after.calls == calls
            assert (after.sample is None) == (rank > 0)
            assert rank > 0 or torch.equal(after.sample, whole("five tiles"))


@pytest.mark.parametrize("group", GROUPS)
def test_only_the_first_rank_keeps_tiles(
    found: list[dict[tuple[str, str], Any]], group: str
) -> None:
    first, *others = in_group(found, group, "memory")
    assert first == len(calls_expected(6, len(GROUPS[group]))) - 2  # its own of all rounds but one
    assert others == [0] * len(others)


@pytest.mark.parametrize("group", ["two", "three"])
def test_a_process_outside_of_the_group_is_refused(
    found: list[dict[tuple[str, str], Any]], group: str
) -> None:
    for rank in {0, 1, 2, 3} - set(GROUPS[group]):
        assert found[rank][group, "outside"] == "this process is not in the group that decodes"


# alone


@pytest.mark.parametrize("name", CASES)
def test_one_process_alone_decodes_the_same(name: str) -> None:
    outcome = decode_until(CASES[name].vae(), CASES[name].latents, None)
    assert outcome.sample is not None
    assert torch.equal(outcome.sample, whole(name))
    assert outcome.calls == calls_expected(COUNTS[name], 1)


def test_a_group_of_one_is_one_process_alone(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        outcome = decode_until(
            CASES["two tiles"].vae(), CASES["two tiles"].latents, dist.group.WORLD
        )
    finally:
        dist.destroy_process_group()
    assert outcome.sample is not None
    assert torch.equal(outcome.sample, whole("two tiles"))


def test_the_sample_has_no_history() -> None:
    case = CASES["two tiles"]
    with torch.enable_grad():
        sample = decode(case.vae(), case.latents, None, ignore)
    assert sample is not None
    assert not sample.requires_grad


@pytest.mark.parametrize("shape", [(2, 12, 2, 8, 8), (12, 2, 8, 8)])
def test_one_video_at_a_time(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 12, T, h, w\)"):
        decode(CASES["two tiles"].vae(), torch.zeros(shape), None, ignore)


# the plan


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_librarys_grid(name: str) -> None:
    """Its tiles are what a plain decode puts through the decoder, in that order."""
    case = CASES[name]
    vae = case.vae()
    tiling = plan_tiles(vae, case.latents.shape)
    assert tiling.count == COUNTS[name]
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    vae.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    vae.decoder.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    with torch.no_grad():
        sample = vae.decode(case.latents, return_dict=False)[0]
    parts = -(-case.size[0] // 2) if case.framewise else 1
    for tile, start in zip(tiling.tiles, range(0, len(inputs), parts), strict=True):
        through = torch.cat(inputs[start : start + parts], dim=2)
        assert torch.equal(tile.cut(case.latents), through)
        decoded = torch.cat(outputs[start : start + parts], dim=2)
        dropped = 0 if case.keep_all_frames else 5
        assert tiling.sample_shape(tile) == decoded[:, :, dropped:].shape
    assert (1, 3, tiling.frames, *tiling.size) == sample.shape


def test_every_tile_is_dealt_once_and_the_largest_first() -> None:
    """At Mochi's own size: 15 tiles, 7 of them narrow."""
    vae = Case((1, 1, 1), tiling=(256, 256, 192, 192)).vae()
    tiling = plan_tiles(vae, (1, 12, 28, 60, 106))
    assert tiling.count == 15
    assert tiling.frames == 163
    for ranks in (1, 2, 3, 4, 8, 20):
        rounds = tiling.rounds(ranks)
        dealt = [tile for tiles in rounds for tile in tiles]
        assert Counter(dealt) == Counter(tiling.tiles)
        assert all(len(tiles) == ranks for tiles in rounds[:-1])
        assert 1 <= len(rounds[-1]) <= ranks
    slowest = [max(map(area, tiles)) for tiles in tiling.rounds(4)]
    assert slowest == [32 * 32, 32 * 32, 32 * 12, 32 * 10]


def area(tile: Tile) -> int:
    return tile.height * tile.width
