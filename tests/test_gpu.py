"""Several GPUs compute what one computes: the other tests' work under NCCL. And a full-size step.

The work is that of `sharing.py`, `whole_videos.py` and `decoding.py` in float32, with
the weights on the GPU of each rank. Inputs and what is compared are in host memory. A mesh that
needs more GPUs than there are is skipped. Comparisons say their largest error on the terminal.

On a CPU most of these results are equal, bit for bit. cuBLAS takes another kernel, with another
order of additions, for a matrix of another height, and a rank has a share of the tokens; with TF32
off that is rounding. Another rounding of every linear layer moves outputs by about 5e-6, the last
latents by 2e-5, and 4e-5 of a video's bytes by one (measured on a CPU): the tolerances are some 20
times that. Tiles are equal bit for bit, on GPUs of one model: a tile has the same shape wherever it
is decoded.

`test_gpu_rehearsal.py` runs the same work and the same checks on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from mochi_app.engine.plan.costs import TRANSFORMER
from tests import sharing
from tests.gpu_work import (
    CPU_TOLERANCE,
    FULL_SIZE,
    LATENT_TOLERANCE,
    LIMIT,
    MESHES,
    MOST_CHANGED,
    SIZES,
    TOLERANCE,
    Found,
    Say,
    Together,
    check_agreement,
    check_cached,
    check_cancels,
    check_frames,
    check_group_timeouts,
    check_outputs,
    check_step,
    check_tile_cancels,
    check_tiles,
    check_videos,
    largest,
    one_step,
    plain_load,
    run_cases,
    transformers_of,
    work_alone,
    work_together,
)
from tests.ranks import run_ranks

GPUS = torch.cuda.device_count()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.timeout(LIMIT + 60),
]


# The tests
@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Say:
    """`say(text)`: a line on the terminal, captured output or not."""

    def line(text: str) -> None:
        with capsys.disabled():
            request.config.get_terminal_writer().line(f"\n{request.node.name}: {text}")

    return line


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one GPU computes."""
    (found,) = run_ranks(1, work_alone, tmp_path_factory.mktemp("alone"), "cuda", LIMIT)
    return dict(found)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Found]]:
    """`together(n)`: what each of n ranks found, which were started once; skips what cannot be."""

    @cache
    def start(size: int) -> list[Found]:
        folder = tmp_path_factory.mktemp(f"gpus{size}")
        return run_ranks(size, work_together, folder, "cuda", LIMIT)

    def found(size: int) -> list[Found]:
        if size > GPUS:
            pytest.skip(f"needs {size} GPUs, one a rank as NCCL wants it: there are {GPUS}")
        return start(size)

    return found


def test_one_gpu_computes_what_the_library_computes(alone: Found, say: Say) -> None:
    error = largest(alone["outputs"], alone["stock outputs"])
    assert error <= TOLERANCE
    say(f"outputs differ by {error:.1e} at most")
    for name, frames in alone["stock frames"].items():
        say(check_frames(name, alone["videos"][name][1], frames, MOST_CHANGED))


def test_one_gpu_computes_what_a_cpu_computes(alone: Found, say: Say) -> None:
    error = largest(alone["outputs"], run_cases(plain_load()))
    assert error <= CPU_TOLERANCE
    say(f"outputs differ by {error:.1e} at most")


@pytest.mark.parametrize("shape", MESHES, ids=sharing.name_of)
def test_gpus_compute_what_one_computes(
    shape: tuple[int, int], alone: Found, together: Together, say: Say
) -> None:
    say(check_outputs(transformers_of(together, shape), alone, TOLERANCE))


@pytest.mark.parametrize("shape", MESHES, ids=sharing.name_of)
def test_first_block_cache_over_gpus(
    shape: tuple[int, int], alone: Found, together: Together, say: Say
) -> None:
    say(check_cached(transformers_of(together, shape), alone, TOLERANCE))


@pytest.mark.parametrize("shape", MESHES, ids=sharing.name_of)
def test_no_gpu_gives_up_on_a_slow_peer(shape: tuple[int, int], together: Together) -> None:
    check_group_timeouts(transformers_of(together, shape), "cuda")


def test_gpus_left_alone_would_part_ways_and_together_do_not(together: Together) -> None:
    (first, agreed), (second, also_agreed) = (
        rank["decisions"] for rank in transformers_of(together, (1, 2))
    )
    assert first != second
    assert agreed == also_agreed


@pytest.mark.parametrize("shape", MESHES, ids=sharing.name_of)
def test_video_of_gpus_is_that_of_one(
    shape: tuple[int, int], alone: Found, together: Together, say: Say
) -> None:
    ranks = together(math.prod(shape))
    say(check_videos(ranks, alone, shape, LATENT_TOLERANCE, MOST_CHANGED))


@pytest.mark.parametrize("size", SIZES)
def test_a_cancel_that_one_gpu_hears_stops_all_and_leaves_nothing(
    size: int, together: Together
) -> None:
    check_cancels(together(size))


@pytest.mark.parametrize("size", SIZES)
def test_gpus_decode_what_one_decodes(size: int, together: Together) -> None:
    check_tiles(together(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_cancel_between_tiles_leaves_the_gpus_usable(size: int, together: Together) -> None:
    check_tile_cancels(together(size))


@pytest.mark.parametrize("size", SIZES)
def test_gpus_agree_over_host_memory(size: int, together: Together) -> None:
    check_agreement(together(size), "nccl")


def test_a_step_of_the_full_size(tmp_path: Path, say: Say) -> None:
    work = partial(one_step, config=TRANSFORMER, latent_shape=FULL_SIZE, dtype=torch.bfloat16)
    (found,) = run_ranks(1, work, tmp_path, "cuda", LIMIT)
    if not found["layers"]:
        pytest.skip("not even one layer has room on this GPU")
    say(check_step(found, TRANSFORMER, FULL_SIZE))
