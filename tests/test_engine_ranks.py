"""Whole videos by several ranks: those of one process, whatever ran or was cancelled before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import Precision, open_pipeline
from mochi_app.engine.parallel import LayoutError
from mochi_app.engine.pipeline import Engine, Result
from mochi_app.messages import Message, Run, Step
from tests.ranks import run_ranks

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-mochi"
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


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Every case in one process, on one thread as the ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = build(Ranks())
    results = {name: make(engine, request) for name, request in CASES.items()}
    torch.set_num_threads(threads)
    return results


Together = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """`together(n)`: the results of each of n ranks, which were started once."""
    return cache(lambda size: run_ranks(size, all_videos, tmp_path_factory.mktemp(f"r{size}")))


@pytest.mark.parametrize("shape", LAYOUTS, ids=lambda shape: f"cfg{shape[0]}sp{shape[1]}")
@pytest.mark.parametrize("case", CASES)
def test_video_of_ranks_is_that_of_one_process(
    case: str, shape: Shape, alone: dict[str, Any], together: Together
) -> None:
    latents, frames = together(shape[0] * shape[1])[0][f"{case} {shape}"]
    expected_latents, expected_frames = alone[case]
    assert (latents - expected_latents).abs().max().item() == 0
    difference = np.abs(frames.astype(int) - expected_frames.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_first_rank_alone_reads_text_and_speaks(size: int, together: Together) -> None:
    first, *others = together(size)
    assert first["reads text"]
    assert first["steps said"] > 0
    assert first["layout"] == (2, size // 2)
    for other in others:
        assert not other["reads text"]
        assert other["steps said"] == 0
        assert other["again"][1] is None


@pytest.mark.parametrize("size", [2, 4])
def test_a_cancel_that_one_rank_hears_stops_all_and_leaves_nothing(
    size: int, alone: dict[str, Any], together: Together
) -> None:
    for results in together(size):
        assert results["cancelled"] == [True] * 14
    assert np.array_equal(together(size)[0]["again"][1], alone["even"][1])


def test_heads_that_do_not_divide_are_refused_at_the_start() -> None:
    class Five(Ranks):
        def mesh(self, shape: tuple[int, int]) -> Any:
            return FiveMesh()

    class FiveMesh:
        def __getitem__(self, name: str) -> FiveMesh:
            self.name = name
            return self

        def size(self) -> int:
            return 5 if self.name == "sp" else 1

        def get_local_rank(self) -> int:
            return 0

        def get_group(self) -> None:
            return None

    with pytest.raises(LayoutError, match="12 attention heads cannot be split over 5 ranks"):
        build(Five(0, 5))
