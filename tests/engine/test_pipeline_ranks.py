"""Whole videos by several ranks: those of one process, whatever ran or was cancelled before."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mochi_app.engine.group import Ranks
from mochi_app.engine.parallel import LayoutError
from tests.ranks import run_ranks
from tests.whole_videos import (
    CASES,
    LAYOUTS,
    Shape,
    Together,
    all_videos,
    build,
    make,
)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Every case in one process, on one thread as the ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = build(Ranks())
    results = {name: make(engine, request) for name, request in CASES.items()}
    torch.set_num_threads(threads)
    return results


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
