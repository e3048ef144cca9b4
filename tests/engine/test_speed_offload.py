"""Offloading: what is fetched when, and that the frames stay.

There is no GPU to offload from here, and the CPU stands in for it: nothing shows that memory is
saved, nor the copies' streams.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading

from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import LoadError
from mochi_app.engine.speed import SpeedOptions
from tests.speed_engines import (
    SKIPPED,
    STEPS,
    THRESHOLD,
    block_runs,
    build,
    cancel,
    complete,
    fail,
    frames_of,
    transformer_of,
)

pytestmark = pytest.mark.usefixtures("own_thread_and_graphs")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeedOptions, "check", lambda options, ranks: None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_parts_make_the_same_frames(
    offload: str, plain_frames: np.ndarray[Any, Any]
) -> None:
    engine = build(SpeedOptions(offload=offload))
    assert np.array_equal(frames_of(engine), plain_frames)
    fail(engine, step=1)
    assert np.array_equal(frames_of(engine), plain_frames)


@pytest.mark.usefixtures("unchecked")
def test_a_block_that_the_cache_skips_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(SpeedOptions(cache_threshold=THRESHOLD, offload="group"))
    blocks = list(transformer_of(engine).transformer_blocks)
    moved: dict[str, list[int]] = {}

    def watch(name: str) -> None:
        usual = getattr(group_offloading.ModuleGroup, name)
        moves = moved[name] = []

        def move(group: Any) -> None:
            moves.extend(blocks.index(module) for module in group.modules if module in blocks)
            usual(group)

        monkeypatch.setattr(group_offloading.ModuleGroup, name, move)

    watch("onload_")
    watch("offload_")
    runs = block_runs(engine)
    frames_of(engine)
    assert moved["onload_"] == moved["offload_"]
    assert moved["onload_"].count(0) == STEPS
    assert moved["onload_"].count(5) == len(runs) == STEPS - SKIPPED


@pytest.mark.usefixtures("unchecked")
def test_parts_not_in_use_are_taken_off_after_any_end() -> None:
    engine = build(SpeedOptions(offload="model"))
    order = [hook.model for hook in engine._pipe._all_hooks]
    pipe = engine._pipe
    assert order == [pipe.text_encoder, pipe.transformer, pipe.vae]
    for before in (complete, cancel):
        hooks = pipe._all_hooks
        before(engine)
        assert pipe._all_hooks is not hooks  # taken off, and put on anew
        assert pipe.transformer._hf_hook.execution_device == torch.device("cpu:0")


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_is_for_one_gpu(offload: str) -> None:
    options = SpeedOptions(offload=offload)
    with pytest.raises(LoadError, match=f"offload {offload}: expected device cuda, not cpu"):
        options.check(Ranks())
    with pytest.raises(LoadError, match=f"offload {offload}: expected a slot of one GPU, not of 2"):
        options.check(Ranks(0, 2, torch.device("cuda")))
    options.check(Ranks(device=torch.device("cuda")))
