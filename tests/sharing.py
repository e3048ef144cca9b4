"""The transformer over ranks: the work that tests on CPUs and on GPUs have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from diffusers import MochiTransformer3DModel

from mochi_app.engine.group import Ranks
from mochi_app.engine.parallel import (
    enable_first_block_cache,
    parallelize,
)
from tests.places import TINY

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


def group_timeouts(ranks: Ranks, shape: tuple[int, int]) -> dict[tuple[str, str], timedelta]:
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
    "group_timeouts": group_timeouts,
}

Together = Callable[[tuple[int, int], str], list[Any]]


def all_work(ranks: Ranks) -> dict[tuple[tuple[int, int], str], Any]:
    """All that this number of ranks has to do, in one start of the processes."""
    shapes = [shape for shape in LAYOUTS if shape[0] * shape[1] == ranks.size]
    return {(shape, name): work(ranks, shape) for shape in shapes for name, work in WORK.items()}
