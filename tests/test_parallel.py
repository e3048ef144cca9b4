"""One video over several ranks is the video of one: real processes on gloo, the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as AttentionRegistry

from mochi_app.engine.group import PATIENCE, Ranks
from mochi_app.engine.parallel import (
    LayoutError,
    check_heads,
    enable_first_block_cache,
    mesh_shape,
    parallelize,
    shares,
)
from tests.ranks import run_ranks

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-mochi"
LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 4)]
# latent frames, height, width: 216 visual tokens, which 2 and 4 divide, and 175, which they do not;
# 3 tokens leave one of four ranks with none
SIZES = {"even": (6, 12, 12), "uneven": (5, 10, 14), "few": (1, 2, 6)}
# valid text tokens of the two samples
PROMPTS = {"guided": (4, 9), "empty": (0, 7), "alone": (5,)}


def name_of(shape: tuple[int, int]) -> str:
    return f"cfg{shape[0]}sp{shape[1]}"


def load_transformer() -> MochiTransformer3DModel:
    return MochiTransformer3DModel.from_pretrained(TINY, subfolder="transformer").eval()


def inputs_of(size: str, prompts: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(size) + len(prompts))
    valid = PROMPTS[prompts]
    masks = torch.zeros(len(valid), 24, dtype=torch.bool)
    for mask, number in zip(masks, valid, strict=True):
        mask[:number] = True
    shape = (len(valid), 12, *SIZES[size])
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(len(valid), 24, 128, generator=generator),
        "timestep": torch.full((len(valid),), 300.0),
        "encoder_attention_mask": masks,
    }


@torch.no_grad()
def forward(transformer: MochiTransformer3DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = transformer(**inputs, return_dict=False)[0]
    return result


def every_case() -> Iterator[tuple[str, str]]:
    for size in SIZES:
        for prompts in PROMPTS:
            yield size, prompts


def outputs_of_all_cases(
    ranks: Ranks, shape: tuple[int, int]
) -> dict[tuple[str, str], torch.Tensor]:
    """What this rank gets in every case, and proof that the model is whole again afterwards."""
    transformer = load_transformer()
    processors = [block.attn1.processor for block in transformer.transformer_blocks]
    handle = parallelize(transformer, ranks.mesh(shape))
    outputs = {case: forward(transformer, inputs_of(*case)) for case in every_case()}
    handle.remove()
    inputs = inputs_of("even", "guided")
    outputs["after", ""] = forward(transformer, inputs)
    kept = [block.attn1.processor for block in transformer.transformer_blocks]
    assert all(now is before for now, before in zip(kept, processors, strict=True))
    assert not any(module._forward_pre_hooks for module in transformer.modules())
    assert not any(module._forward_hooks for module in transformer.modules())
    return outputs


THRESHOLD = 0.08


def sequence(transformer: MochiTransformer3DModel) -> list[torch.Tensor]:
    """Outputs of eight steps that drift slowly, so that the cache skips some and not others."""
    inputs = inputs_of("uneven", "guided")
    drift = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    drift[:, :, 2:] = 0.0  # only the first frames move: the ranks see very different changes
    outputs = []
    with transformer.cache_context("cond_uncond"):
        for step in range(8):
            inputs["hidden_states"] = inputs["hidden_states"] + 0.02 * step * drift
            outputs.append(forward(transformer, inputs))
    return outputs


def blocks_run(transformer: MochiTransformer3DModel) -> list[int]:
    """A list that grows by one each time the last block computes."""
    calls: list[int] = []
    block = transformer.transformer_blocks[-1]
    block.ff.register_forward_hook(lambda *_: calls.append(1))
    return calls


def cached(ranks: Ranks, shape: tuple[int, int]) -> tuple[list[torch.Tensor], int]:
    """Outputs with the first-block cache, and in how many steps this rank ran all blocks."""
    transformer = load_transformer()
    parallelize(transformer, ranks.mesh(shape))
    enable_first_block_cache(transformer, THRESHOLD, ranks.group)
    calls = blocks_run(transformer)
    return sequence(transformer), len(calls)


def lone_decisions(ranks: Ranks, shape: tuple[int, int]) -> list[list[bool]]:
    """What each rank would decide in each step from its own tokens, and what all decide."""
    transformer = load_transformer()
    parallelize(transformer, ranks.mesh(shape))
    enable_first_block_cache(transformer, THRESHOLD, ranks.group)
    hook = transformer.transformer_blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
    agreed = hook._should_compute_remaining_blocks
    own: list[bool] = []
    common: list[bool] = []

    def both(residual: torch.Tensor) -> bool:
        own.append(bool(type(hook)._should_compute_remaining_blocks(hook, residual)))
        common.append(agreed(residual))
        return common[-1]

    hook._should_compute_remaining_blocks = both
    sequence(transformer)
    return [own, common]


def patience(ranks: Ranks, shape: tuple[int, int]) -> dict[tuple[str, str], timedelta]:
    """How long a peer is waited for, by axis and by where the tensors are."""
    mesh = ranks.mesh(shape)
    assert mesh is not None
    return {
        (name, kind): mesh[name].get_group()._get_backend(torch.device(kind)).options._timeout
        for name in ("cfg", "sp")
        for kind in {"cpu", ranks.device.type}
    }


WORK = {
    "outputs": outputs_of_all_cases,
    "cached": cached,
    "decisions": lone_decisions,
    "patience": patience,
}
Together = Callable[[tuple[int, int], str], list[Any]]


def all_work(ranks: Ranks) -> dict[tuple[tuple[int, int], str], Any]:
    """All that this number of ranks has to do, in one start of the processes."""
    shapes = [shape for shape in LAYOUTS if shape[0] * shape[1] == ranks.size]
    return {(shape, name): work(ranks, shape) for shape in shapes for name, work in WORK.items()}


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
    for timeouts in together(shape, "patience"):
        assert timeouts == {("cfg", "cpu"): PATIENCE, ("sp", "cpu"): PATIENCE}


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
