"""One video over several ranks is the video of one: real processes on gloo, the embedded model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as AttentionRegistry

from mochi_app.engine.group import GROUP_TIMEOUT, Ranks
from mochi_app.engine.parallel import (
    LayoutError,
    check_heads,
    mesh_shape,
    parallelize,
    shares,
)
from tests.ranks import run_ranks
from tests.sharing import (
    LAYOUTS,
    Together,
    all_work,
    cached,
    every_case,
    forward,
    inputs_of,
    load_transformer,
    name_of,
)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """`together(shape, name)`: the results of that work on each rank."""

    @cache
    def on(size: int) -> list[Any]:
        return run_ranks(size, all_work, tmp_path_factory.mktemp(f"ranks{size}"))

    return lambda shape, name: [one[shape, name] for one in on(shape[0] * shape[1])]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], torch.Tensor]:
    """The stock transformer's outputs, on one thread as the ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformer = load_transformer()
    outputs = {case: forward(transformer, inputs_of(*case)) for case in every_case()}
    outputs["after", ""] = outputs["even", "guided"]
    torch.set_num_threads(threads)
    return outputs


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
def test_ranks_compute_what_one_process_computes(
    shape: tuple[int, int], alone: dict[tuple[str, str], torch.Tensor], together: Together
) -> None:
    for outputs in together(shape, "outputs"):
        for case, expected in alone.items():
            error = (outputs[case] - expected).abs().max().item()
            # matrices of one or two rows take another way through the BLAS
            assert error <= 1e-5 if case[0] == "few" else error == 0, (case, error)


def test_on_one_rank_it_is_the_stock_transformer(
    alone: dict[tuple[str, str], torch.Tensor],
) -> None:
    transformer = load_transformer()
    handle = parallelize(transformer, None)
    torch.set_num_threads(1)
    for case in every_case():
        assert torch.equal(forward(transformer, inputs_of(*case)), alone[case]), case
    assert handle.bytes_sent == 0


def test_attention_backend_reaches_it(alone: dict[tuple[str, str], torch.Tensor]) -> None:
    transformer = load_transformer()
    parallelize(transformer, None)
    transformer.set_attention_backend("_native_math")
    try:
        processors = [block.attn1.processor for block in transformer.transformer_blocks]
        chosen = {processor._attention_backend for processor in processors}
        assert chosen == {AttentionBackendName._NATIVE_MATH}
        output = forward(transformer, inputs_of("uneven", "guided"))
        expected = alone["uneven", "guided"]
        assert not torch.equal(output, expected)  # another kernel did it
        assert torch.allclose(output, expected, atol=1e-5)
    finally:
        transformer.reset_attention_backend()
        AttentionRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize(
    ("ranks", "guided", "expected"),
    [(1, True, (1, 1)), (2, True, (2, 1)), (3, True, (1, 3)), (4, True, (2, 2)),
     (6, True, (2, 3)), (8, True, (2, 4)), (4, False, (1, 4)), (8, False, (1, 8))],
)  # fmt: skip
def test_default_mesh(ranks: int, guided: bool, expected: tuple[int, int]) -> None:
    assert mesh_shape(ranks, guided) == expected


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(LayoutError, match="12 attention heads cannot be split over 5 ranks"):
        check_heads(12, 5)
    for sp in (1, 2, 3, 4, 6):
        check_heads(12, sp)


def test_run_without_guidance_leaves_cfg_idle_where_heads_do_not_divide() -> None:
    assert Ranks(0, 4).shape_for(guided=False, heads=12) == (1, 4)
    assert Ranks(0, 8).shape_for(guided=False, heads=12) == (2, 4)
    assert Ranks(0, 8).shape_for(guided=False, heads=24) == (1, 8)


def test_shares_are_consecutive_and_differ_by_one_at_most() -> None:
    assert shares(44_520, 4) == [11_130] * 4
    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(3, 4) == [1, 1, 1, 0]


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
def test_no_rank_gives_up_on_a_slow_peer_before_the_slot_does(
    shape: tuple[int, int], together: Together
) -> None:
    for timeouts in together(shape, "group_timeouts"):
        assert timeouts == {("cfg", "cpu"): GROUP_TIMEOUT, ("sp", "cpu"): GROUP_TIMEOUT}


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
def test_first_block_cache_over_ranks(shape: tuple[int, int], together: Together) -> None:
    expected, computed = cached(Ranks(), (1, 1))
    assert 1 < computed < 8  # some steps were skipped and some were not
    for outputs, count in together(shape, "cached"):
        assert count == computed
        for output, one in zip(outputs, expected, strict=True):
            assert torch.allclose(output, one, atol=1e-5)


def test_ranks_left_alone_would_part_ways_and_together_do_not(together: Together) -> None:
    (first, agreed), (second, also_agreed) = together((1, 2), "decisions")
    assert first != second  # with diffusers' own rule one rank would wait for the other for ever
    assert agreed == also_agreed
