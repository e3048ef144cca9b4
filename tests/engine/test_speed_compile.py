"""Compiled blocks: right, compiled once for each layout, and never again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi_app.engine.group import Ranks
from mochi_app.engine.parallel import parallelize
from mochi_app.engine.pipeline import Engine
from mochi_app.engine.speed import SpeedOptions
from mochi_app.messages import Run
from tests.ranks import run_ranks
from tests.speed_engines import (
    BEFORE,
    OTHER,
    REQUEST,
    SHORT,
    SHORT_UNGUIDED,
    UNGUIDED,
    Optioned,
    build,
    difference,
    frames_of,
    new_graphs,
    quick_compilation,
    transformer_of,
)

pytestmark = pytest.mark.usefixtures("own_thread_and_graphs")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU wants g++"
)


def test_compiled_blocks_are_right_and_compiled_once(
    plain_frames: np.ndarray[Any, Any], engine_with: Optioned
) -> None:
    engine, frames = engine_with("compile")
    assert np.array_equal(frames, plain_frames)
    larger = replace(OTHER, height=96, num_frames=13, prompt="a ring and a ball and a square")
    for request in (OTHER, replace(OTHER, prompt=""), larger, REQUEST):
        assert new_graphs(partial(frames_of, engine, request)) == 0, request
    # the first, the middle and the last blocks differ, each before and after its attention
    assert new_graphs(partial(frames_of, engine, UNGUIDED)) == 6  # batches of one sample
    assert new_graphs(partial(frames_of, engine, replace(UNGUIDED, prompt=""))) == 0


def test_another_layout_needs_no_new_graphs(engine_with: Optioned) -> None:
    engine, first = engine_with("compile")

    def laid_out_anew() -> np.ndarray[Any, Any]:
        engine._parallel.remove()  # type: ignore[union-attr]
        engine._parallel = parallelize(transformer_of(engine), None)
        return frames_of(engine)

    assert new_graphs(lambda: np.testing.assert_array_equal(laid_out_anew(), first)) == 0


@pytest.mark.parametrize(
    "name", ["cache, compile", pytest.param("cache, compile, fp8", marks=pytest.mark.slow)]
)
def test_a_cache_and_casts_stay_outside_of_the_compiled_part(
    name: str, engine_with: Optioned
) -> None:
    engine, frames = engine_with(name)
    assert np.array_equal(frames, engine_with(name.replace(", compile", ""))[1])
    assert new_graphs(partial(frames_of, engine, OTHER)) == 0


@pytest.mark.slow
@needs_compiler
def test_really_compiled_blocks_stay_close(
    plain_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    engine = build(SpeedOptions(compile=True))
    last: list[torch.Tensor] = []
    for each in (plain_engine, engine):
        decode = each._decode

        def note(latents: torch.Tensor, *rest: Any, decode: Any = decode) -> Any:
            last.append(latents.clone())
            return decode(latents, *rest)

        monkeypatch.setattr(each, "_decode", note)
    request = replace(REQUEST, num_inference_steps=3)
    first = frames_of(engine, request)
    for before in BEFORE.values():
        assert new_graphs(partial(before, engine)) == 0
    assert np.array_equal(frames_of(engine, request), first)
    assert difference(first, frames_of(plain_engine, request)) < 0.01
    assert (last[0] - last[-1]).abs().max() < 1e-4


class Fixed(Ranks):
    """Ranks with an axis for the CFG pair whatever is asked."""

    def shape_for(self, guided: bool, heads: int) -> tuple[int, int]:
        return (self.size, 1)


def compiled_jobs(ranks: Ranks) -> list[tuple[str, np.ndarray[Any, Any], int]]:
    """Jobs with and without guidance, over layouts that follow it, and one that does not."""
    with quick_compilation():
        engine = build(SpeedOptions(compile=True), ranks)
    results: list[tuple[str, np.ndarray[Any, Any], int]] = []

    def run(name: str, request: Run) -> None:
        frames: list[np.ndarray[Any, Any]] = []
        graphs = new_graphs(lambda: frames.append(frames_of(engine, request)))
        results.append((name, frames[0], graphs))

    for _ in range(3):
        run("guided", SHORT)
        run("unguided", SHORT_UNGUIDED)
    engine._ranks = Fixed(ranks.rank, ranks.size, ranks.device)
    run("unguided", SHORT_UNGUIDED)
    run("guided", SHORT)
    return results


@pytest.mark.slow
def test_layouts_of_two_ranks_have_graphs_of_their_own(
    tmp_path: Path, plain_engine: Engine
) -> None:
    expected = {
        "guided": frames_of(plain_engine, SHORT),
        "unguided": frames_of(plain_engine, SHORT_UNGUIDED),
    }
    one, other = run_ranks(2, compiled_jobs, tmp_path / "ranks")
    for name, frames, _ in one:
        assert np.array_equal(frames, expected[name]), name
    for results in (one, other):
        assert [graphs for *_, graphs in results] == [6, 6, 0, 0, 0, 0, 3, 0]
