"""An engine's options: what each changes in the frames, and that no run leaves anything behind."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi_app.engine import speed
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import LoadError
from mochi_app.engine.pipeline import Engine
from mochi_app.engine.speed import SpeedOptions
from mochi_app.messages import Configure
from tests.ranks import run_ranks
from tests.speed_engines import (
    BEFORE,
    EARLY,
    OPTIONS,
    OTHER,
    REQUEST,
    SKIPPED,
    STEPS,
    THRESHOLD,
    UNGUIDED,
    Broken,
    Optioned,
    block_runs,
    build,
    difference,
    fail,
    frames_of,
    needs_torchao,
    new_graphs,
    transformer_of,
)

pytestmark = [
    pytest.mark.usefixtures("own_thread_and_graphs"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was:UserWarning"),
]


EACH = [
    pytest.param(name, marks=[needs_torchao] if name == "int8" else [])
    for name in OPTIONS
    if name.count(",") < 2
]


def stored_bytes(module: torch.nn.Module) -> int:
    """What the weights take up; a quantized one is a pair of tensors behind one of its old type."""
    total = 0
    for weight in module.parameters():
        flatten = getattr(weight, "__tensor_flatten__", None)
        parts = [getattr(weight, name) for name in flatten()[0]] if flatten else [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


# What the job before leaves.


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("before", BEFORE)
def test_frames_do_not_depend_on_the_job_before(
    before: str, name: str, engine_with: Optioned
) -> None:
    engine, first = engine_with(name)
    BEFORE[before](engine)
    assert np.array_equal(frames_of(engine), first)


@pytest.mark.parametrize("before", EARLY)
def test_it_is_the_reset_that_makes_it_so(
    before: str, engine_with: Optioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, first = engine_with("cache")

    def frames_or_error() -> Any:
        try:
            return frames_of(engine)
        except TypeError as error:  # there is a first block's result and none of the others
            return error

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reset", lambda: None)
        EARLY[before](engine)
        speed.reset(engine._pipe)
        assert np.array_equal(frames_of(engine), first)
        EARLY[before](engine)
        assert not np.array_equal(frames_or_error(), first)
    speed.reset(engine._pipe)


def test_nothing_of_a_cache_is_kept_between_jobs(engine_with: Optioned) -> None:
    engine, _ = engine_with("cache")
    leader = (
        transformer_of(engine)
        .transformer_blocks[0]
        ._diffusers_hook.get_hook("fbc_leader_block_hook")
    )
    for before in BEFORE.values():
        before(engine)
        assert leader.state_manager._state_cache == {}


def test_a_layer_that_failed_while_its_weights_were_cast_is_whole_again(
    engine_with: Optioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, first = engine_with("fp8")
    layer = transformer_of(engine).transformer_blocks[2].ff.net[2]

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight is layer.weight:
            raise Broken
        return torch._C._nn.linear(states, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        with pytest.raises(Broken):
            frames_of(engine, OTHER)
    assert layer.weight.dtype is torch.float32
    assert np.array_equal(frames_of(engine), first)
    assert layer.weight.dtype is torch.float8_e4m3fn


# What each option changes.


def test_no_option_is_no_change(plain_engine: Engine) -> None:
    assert (
        SpeedOptions.of(
            Configure(
                slot=0, rank=0, world_size=1, model="", device="cpu", dtype="auto", scratch=""
            )
        )
        == SpeedOptions()
    )
    transformer = transformer_of(plain_engine)
    assert not any(hasattr(module, "_diffusers_hook") and module._diffusers_hook.hooks
                   for module in transformer.modules())  # fmt: skip
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_a_cache_that_never_skips_changes_nothing(plain_frames: np.ndarray[Any, Any]) -> None:
    engine = build(SpeedOptions(cache_threshold=1e-9))
    runs = block_runs(engine)
    assert np.array_equal(frames_of(engine), plain_frames)
    assert len(runs) == STEPS


def test_a_cache_skips_blocks_and_stays_close(plain_frames: np.ndarray[Any, Any]) -> None:
    engine = build(SpeedOptions(cache_threshold=THRESHOLD))
    runs = block_runs(engine)
    error = difference(frames_of(engine), plain_frames)
    assert len(runs) == STEPS - SKIPPED
    another = frames_of(build(SpeedOptions()), replace(REQUEST, seed=1))
    assert 0 < error < difference(another, plain_frames) / 2, error


@pytest.mark.parametrize(
    ("name", "bound"), [("fp8", 3.0), pytest.param("int8", 1.0, marks=needs_torchao)]
)
def test_a_quantized_model_is_half_as_large_and_stays_close(
    name: str,
    bound: float,
    plain_engine: Engine,
    plain_frames: np.ndarray[Any, Any],
    engine_with: Optioned,
) -> None:
    engine, frames = engine_with(name)
    assert 0 < difference(frames, plain_frames) < bound
    assert stored_bytes(transformer_of(engine)) < stored_bytes(transformer_of(plain_engine)) / 2


def test_fp8_leaves_norms_patches_frequencies_and_output_alone(engine_with: Optioned) -> None:
    transformer = transformer_of(engine_with("fp8")[0])
    wide = {name for name, weight in transformer.named_parameters()
            if weight.dtype is torch.float32}  # fmt: skip
    assert {"pos_frequencies", "patch_embed.proj.weight", "proj_out.weight"} <= wide
    assert all(
        ("norm" in name) == (name in wide)
        for name, _ in transformer.named_parameters()
        if name.startswith("transformer_blocks.")
    )


@pytest.mark.parametrize("name", ["fp8", pytest.param("int8", marks=needs_torchao)])
def test_a_quantized_model_computes_in_the_type_that_it_was_loaded_in(
    name: str, plain_frames: np.ndarray[Any, Any]
) -> None:
    engine = build(OPTIONS[name], dtype="bfloat16")
    transformer = transformer_of(engine)
    seen: set[torch.dtype] = set()
    for layer in (transformer.transformer_blocks[2].ff, transformer.proj_out):
        layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    assert difference(frames_of(engine), plain_frames) < 4
    assert seen == {torch.bfloat16}
    assert transformer.pos_frequencies.dtype is torch.float32


def lora_of(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 for some layers of attention and feed-forward."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in transformer.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_out.0", "attn1.add_k_proj", "ff.net.2")):
            sizes = {"lora_A": (4, module.in_features), "lora_B": (module.out_features, 4)}
            for part, size in sizes.items():
                weights[f"{name}.{part}.weight"] = 0.1 * torch.randn(size, generator=generator)
    return weights


def own_types(transformer: torch.nn.Module) -> dict[str, torch.dtype]:
    """Types of the model's own weights, whether or not adapters wrap their layers."""
    return {
        name.replace(".base_layer.", "."): weight.dtype
        for name, weight in transformer.named_parameters()
        if ".lora_" not in name
    }


@pytest.mark.parametrize(
    ("name", "nearer"),
    [
        ("fp8", 0.5),
        pytest.param("int8", 0.5, marks=needs_torchao),
        pytest.param("compile", 0.0, marks=pytest.mark.slow),
    ],
)
def test_adapters_come_and_go_after_the_options(
    name: str, nearer: float, engine_with: Optioned
) -> None:
    """`nearer` is how far the frames may be from what is wanted, in ways of the adapter."""
    adapted = build(SpeedOptions())
    transformer_of(adapted).load_lora_adapter(lora_of(transformer_of(adapted)), prefix=None)
    wanted = frames_of(adapted)
    engine, first = engine_with(name)
    transformer = transformer_of(engine)
    bare = own_types(transformer)
    with speed.uncast(transformer):
        transformer.load_lora_adapter(lora_of(transformer), prefix=None)
    assert own_types(transformer) == bare
    error = difference(frames_of(engine), wanted)
    transformer.unload_lora()
    assert new_graphs(lambda: np.testing.assert_array_equal(frames_of(engine), first)) == 0
    assert error <= nearer * difference(wanted, first), error
    assert own_types(transformer) == bare


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_threshold": -0.1}, "cache threshold -0.1: expected 0"),
        ({"cache_threshold": float("nan")}, "cache threshold nan: expected 0"),
        ({"cache_threshold": 1.0}, "cache threshold 1.0: expected 0"),
        ({"quantization": "int4"}, "quantization 'int4': expected none, fp8 or int8"),
        ({"offload": "disk"}, "offload 'disk': expected none, model or group"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        SpeedOptions(**changes)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoadError, match="quantization int8: expected the package torchao"):
        SpeedOptions(quantization="int8").check(Ranks())
    with pytest.raises(LoadError, match=r"expected a C\+\+ compiler, and found no g\+\+"):
        SpeedOptions(compile=True).check(Ranks())
    with pytest.raises(LoadError, match="expected the package triton"):
        SpeedOptions(compile=True).check(Ranks(device=torch.device("cuda")))
    SpeedOptions(THRESHOLD, quantization="fp8").check(Ranks())


def test_a_wrong_option_is_refused_before_the_pipeline_is_touched() -> None:
    with pytest.raises(LoadError):
        speed.apply(None, SpeedOptions(offload="model"), Ranks())


# Several ranks.


def cached_jobs(ranks: Ranks) -> dict[str, Any]:
    """With the cache: the request first, then after each way that the job before may have gone."""
    engine = build(SpeedOptions(cache_threshold=THRESHOLD), ranks)
    runs = block_runs(engine)
    results: dict[str, Any] = {"first": frames_of(engine), "runs": len(runs)}
    ways: dict[str, Callable[[Engine], Any]] = {
        "cancelled": partial(cancel_on_the_second, rank=ranks.rank),
        "failed": partial(fail, step=1),
        "unguided": partial(frames_of, request=UNGUIDED),  # over another mesh
    }
    for name, before in ways.items():
        before(engine)
        results[name] = frames_of(engine)
    return results


def cancel_on_the_second(engine: Engine, rank: int) -> None:
    """A cancel that one rank alone hears of, after the first step: before it, it looks twice."""
    looks: list[int] = []

    def cancelled() -> bool:
        looks.append(1)
        return rank == 1 and len(looks) == 3

    assert engine.run(OTHER, lambda message: None, cancelled) is None
    assert len(looks) == 3


def test_two_ranks_skip_alike_and_leave_nothing(tmp_path: Path, engine_with: Optioned) -> None:
    one, other = run_ranks(2, cached_jobs, tmp_path / "ranks")
    assert one.pop("runs") == other.pop("runs") == STEPS - SKIPPED
    first = one["first"]
    assert difference(first, engine_with("cache")[1]) < 0.01
    for before, frames in one.items():
        assert np.array_equal(frames, first), before
