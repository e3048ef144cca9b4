"""Tiles dealt over ranks decode to what one process decodes: real processes, the embedded VAE."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mochi_app.engine.decode import decode, plan_tiles
from tests.decoding import (
    CASES,
    COUNTS,
    GROUPS,
    Case,
    all_work,
    area,
    calls_expected,
    decode_until,
    ignore,
    in_group,
    whole,
)
from tests.ranks import run_ranks


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """As the ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each of four processes found."""
    return run_ranks(4, all_work, tmp_path_factory.mktemp("ranks"))


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
