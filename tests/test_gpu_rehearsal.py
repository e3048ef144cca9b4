"""The work and the checks of `test_gpu.py` on a CPU, so that no mistake in them waits for a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from mochi_app.engine.group import Ranks
from mochi_app.engine.plan.costs import GB, TRANSFORMER
from mochi_app.engine.plan.fit import read_config
from tests import decoding, gpu_work, sharing, whole_videos
from tests.benchmarks.random_models import layers_that_fit
from tests.places import TINY
from tests.ranks import run_ranks, seeing

SMALL = replace(whole_videos.EVEN, height=32, width=48, num_frames=7)
TILED = {name: decoding.CASES[name] for name in ("two tiles", "five tiles")}


def few_cases(ranks: Ranks) -> list[gpu_work.Found]:
    """What both kinds of work find, in few and small cases; alone on the first rank."""
    unguided = replace(SMALL, guidance_scale=1.0)
    with (
        mock.patch.object(whole_videos, "CASES", {"even": SMALL, "even unguided": unguided}),
        mock.patch.object(whole_videos, "EVEN", SMALL),
        mock.patch.object(decoding, "CASES", TILED),
        mock.patch.object(sharing, "PROMPTS", {"guided": (4, 9)}),
    ):
        together = gpu_work.work_together(ranks)
        return [together, gpu_work.work_alone(Ranks()) if ranks.first else {}]


def test_two_ranks_on_a_cpu(tmp_path: Path) -> None:
    results = run_ranks(2, few_cases, tmp_path)
    ranks, alone = [found for found, _ in results], results[0][1]
    assert gpu_work.largest(alone["outputs"], alone["stock outputs"]) == 0
    for name, frames in alone["stock frames"].items():
        gpu_work.check_frames(name, alone["videos"][name][1], frames, 0.0)
    for shape in ((2, 1), (1, 2)):
        of_mesh = [rank["transformer"][shape] for rank in ranks]
        gpu_work.check_outputs(of_mesh, alone, 1e-5)
        gpu_work.check_cached(of_mesh, alone, 1e-5)
        gpu_work.check_group_timeouts(of_mesh, "cpu")
        gpu_work.check_videos(ranks, alone, shape, 5e-5, 1e-3)
    gpu_work.check_cancels(ranks)
    with mock.patch.object(decoding, "CASES", TILED):
        gpu_work.check_tiles(ranks)
    gpu_work.check_tile_cancels(ranks)
    gpu_work.check_agreement(ranks, "gloo")


def test_a_step_on_a_cpu() -> None:
    config = read_config(str(TINY), "transformer")
    shape = (2, 4, 6)
    found = gpu_work.one_step(Ranks(), config, shape, torch.bfloat16)
    assert gpu_work.check_step(found, config, shape).startswith("6 layers; ")


def test_layers_that_fit_are_all_that_have_room() -> None:
    layers = partial(layers_that_fit, TRANSFORMER, gpu_work.FULL_SIZE, torch.bfloat16)
    assert layers(80 * GB) == 48
    assert layers(8 * GB) < 1
    assert layers(20 * GB) < layers(22 * GB) < 48


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [(None, "cuda", "1"), ("3,5", "cuda", "5"), ("3", "cuda", ""), ("3,5", "cpu", "")],
)
def test_a_rank_sees_its_own_gpu_only(
    visible: str | None, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(name, visible)
    with seeing(1, device):
        assert os.environ[name] == expected
    assert os.environ.get(name) == visible
