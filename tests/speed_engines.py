"""Engines with options, what they are asked for, and the ways a job can go wrong in them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mochi_app.engine import speed
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import Precision, open_pipeline
from mochi_app.engine.pipeline import Engine, Result
from mochi_app.engine.speed import SpeedOptions
from mochi_app.messages import Message, Run, Step
from tests.places import TINY

CPU = torch.device("cpu")
STEPS = 6
REQUEST = Run(
    job_id="b", prompt="a red ring moving left on a white background", negative_prompt="", seed=0,
    num_inference_steps=STEPS, guidance_scale=4.5, height=64, width=80, num_frames=7, fps=12,
)  # fmt: skip
# Other by a word: a cache left from its first steps is near enough to pass for that of REQUEST.
OTHER = replace(REQUEST, job_id="a", prompt=REQUEST.prompt.replace("left", "right"))
UNGUIDED = replace(OTHER, guidance_scale=1.0)
SHORT, SHORT_UNGUIDED = (replace(run, num_inference_steps=2) for run in (REQUEST, UNGUIDED))
THRESHOLD = 0.2
SKIPPED = 2  # of the steps of REQUEST, with that threshold
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
OPTIONS = {
    "cache": SpeedOptions(cache_threshold=THRESHOLD),
    "fp8": SpeedOptions(quantization="fp8"),
    "int8": SpeedOptions(quantization="int8"),
    "compile": SpeedOptions(compile=True),
    "cache, compile": SpeedOptions(cache_threshold=THRESHOLD, compile=True),
    "cache, fp8": SpeedOptions(cache_threshold=THRESHOLD, quantization="fp8"),
    "cache, compile, fp8": SpeedOptions(THRESHOLD, compile=True, quantization="fp8"),
}


def build(options: SpeedOptions, ranks: Ranks | None = None, dtype: str = "float32") -> Engine:
    """The embedded model with those options, as `pipeline.load` makes it but for the warm-up."""
    ranks = ranks or Ranks()
    torch.set_num_threads(1)
    precision = Precision(getattr(torch, dtype), torch.float32, torch.float32)
    pipe = open_pipeline(str(TINY), precision, CPU, text=ranks.first)
    pipe.set_progress_bar_config(disable=True)
    speed.apply(pipe, options, ranks)
    return Engine(pipe, ranks=ranks)


def frames_of(engine: Engine, request: Run = REQUEST) -> np.ndarray[Any, Any]:
    """Frames of a run that nobody cancels; of shape (0,) on ranks that have none."""
    result = engine.run(request, lambda message: None, lambda: False)
    assert isinstance(result, Result)
    return np.zeros(0) if result.frames is None else result.frames


def difference(frames: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference, in grey levels of 255."""
    return float(np.abs(frames.astype(float) - others.astype(float)).mean())


def transformer_of(engine: Engine) -> Any:
    return engine._pipe.transformer


def block_runs(engine: Engine) -> list[int]:
    """A list that grows by one each time the last block computes."""
    runs: list[int] = []
    feed_forward = transformer_of(engine).transformer_blocks[-1].ff
    feed_forward.register_forward_hook(lambda *_: runs.append(1))
    return runs


@contextmanager
def quick_compilation() -> Iterator[None]:
    """torch traces, guards and recompiles as ever, and then runs the graphs with plain kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "compile_blocks", partial(speed.compile_blocks, backend="eager"))
        yield


Optioned = Callable[[str], tuple[Engine, np.ndarray[Any, Any]]]


class Broken(RuntimeError):
    """What a test raises inside the model."""


def complete(engine: Engine) -> None:
    frames_of(engine, OTHER)


def cancel(engine: Engine) -> None:
    """A cancel after the first step."""
    steps: list[int] = []

    def count(message: Message) -> None:
        if isinstance(message, Step):
            steps.append(message.step)

    assert engine.run(OTHER, count, lambda: bool(steps)) is None
    assert steps == [1]


def fail(engine: Engine, step: int) -> None:
    """An error between two blocks, in `step` (from 0): half of a cache's state is of this step."""
    passes: list[int] = []

    def raise_in_time(*_: Any) -> None:
        passes.append(1)
        if len(passes) == step + 1:
            raise Broken

    hook = transformer_of(engine).transformer_blocks[2].register_forward_hook(raise_in_time)
    with pytest.raises(Broken):
        frames_of(engine, OTHER)
    hook.remove()


EARLY: dict[str, Callable[[Engine], None]] = {
    "cancelled": cancel,
    "failed in the first step": partial(fail, step=0),
    "failed in the second step": partial(fail, step=1),
}
BEFORE = {"completed": complete} | EARLY


def new_graphs(work: Callable[[], Any]) -> int:
    """How many graphs torch compiles during `work`."""
    before = counters["stats"]["unique_graphs"]
    work()
    return int(counters["stats"]["unique_graphs"] - before)
