"""Whole videos by several ranks: the work that tests on CPUs and on GPUs have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import MochiPipeline

from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import Precision, open_pipeline
from mochi_app.engine.pipeline import Engine, Result
from mochi_app.messages import Message, Run, Step
from tests.places import TINY

Shape = tuple[int, int]

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 4)]  # (cfg, sp)

# 64x96 and 31 frames are 144 visual tokens; 80x112 and 25 frames are 175, which no two ranks divide
EVEN = Run(
    job_id="even", prompt="a red ring moving left on a white background", negative_prompt="",
    seed=3, num_inference_steps=4, guidance_scale=4.5, height=64, width=96, num_frames=31, fps=12,
)  # fmt: skip

UNEVEN = replace(EVEN, job_id="uneven", height=80, width=112, num_frames=25)

CASES = {
    "even": EVEN,
    "uneven": UNEVEN,
    "even unguided": replace(EVEN, guidance_scale=1.0),
    "uneven unguided": replace(UNEVEN, guidance_scale=1.0),
}


def unsaid(message: Message) -> None:
    pass


def build(ranks: Ranks) -> Engine:
    """The embedded model on this rank, as `pipeline.load` makes it but for the warm-up."""
    exact = Precision(torch.float32, torch.float32, torch.float32)
    pipe = open_pipeline(str(TINY), exact, torch.device("cpu"), text=ranks.first)
    pipe.set_progress_bar_config(disable=True)
    return Engine(pipe, ranks=ranks)


def make(engine: Engine, request: Run) -> tuple[torch.Tensor, np.ndarray[Any, Any] | None]:
    """Last latents and frames of a run that nobody cancels."""
    seen: list[torch.Tensor] = []
    decode = engine._decode

    def note(latents: torch.Tensor, *rest: Any) -> Any:
        seen.append(latents.clone())
        return decode(latents, *rest)

    with mock.patch.object(engine, "_decode", note):
        result = engine.run(request, unsaid, lambda: False)
    assert isinstance(result, Result)
    return (seen[0] if seen else torch.empty(0)), result.frames


class CancelAt:
    """A cancel that one rank hears of at its n-th look, and the others do not."""

    def __init__(self, rank: int, looks: int) -> None:
        self.rank, self.left = rank, looks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0 and self.rank == 1


class Fixed(Ranks):
    """Ranks that lie in one mesh whatever is asked; what the engine chooses is tested apart."""

    def __init__(self, ranks: Ranks, shape: Shape) -> None:
        super().__init__(ranks.rank, ranks.size, ranks.device)
        self._fixed = shape

    def shape_for(self, guided: bool, heads: int) -> Shape:
        return self._fixed


def all_videos(ranks: Ranks) -> dict[str, Any]:
    """Every case in every layout on this rank; then, with the engine's own choice of layout,
    cancels at many moments and the first case again."""
    torch.set_num_threads(1)
    engine = build(ranks)
    results: dict[str, Any] = {"reads text": engine._pipe.text_encoder is not None}
    assert engine._parallel is not None
    with pytest.raises(RuntimeError, match="lies on a mesh already"):
        Engine(engine._pipe, ranks=ranks)
    engine._parallel.remove()
    for shape in LAYOUTS:
        if shape[0] * shape[1] == ranks.size:
            fixed = Engine(engine._pipe, ranks=Fixed(ranks, shape))
            for name, request in CASES.items():
                results[f"{name} {shape}"] = make(fixed, request)
            assert fixed._parallel is not None
            fixed._parallel.remove()
    engine = Engine(engine._pipe, ranks=ranks)
    steps: list[int] = []

    def count(message: Message) -> None:
        steps.append(message.step if isinstance(message, Step) else 0)

    results["cancelled"] = [
        engine.run(request, count, CancelAt(ranks.rank, looks)) is None
        for looks in range(7)
        for request in (EVEN, CASES["even unguided"])
    ]
    results["steps said"] = max(steps, default=0)
    results["again"] = make(engine, EVEN)
    results["layout"] = engine._shape
    return results


Together = Callable[[int], list[dict[str, Any]]]


def stock_frames(pipe: MochiPipeline, request: Run) -> np.ndarray[Any, Any]:
    """The frames of a plain call with the request's arguments, as the pipeline's own images."""
    images = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).frames[0]
    return np.stack([np.asarray(image) for image in images])
