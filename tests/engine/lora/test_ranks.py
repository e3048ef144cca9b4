"""A LoRA over several ranks is that of one process, and an engine takes it for one run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mochi_app.engine.group import Ranks
from mochi_app.engine.lora import LoraCache
from mochi_app.engine.parallel import parallelize
from mochi_app.engine.pipeline import Engine
from mochi_app.loras import LoraError, lora_names
from mochi_app.messages import Run
from tests.lora_files import (
    PROMPT,
    latents,
    open_tiny,
)
from tests.ranks import run_ranks

SIDE = 112  # pixels: 2 x 7 x 5 = 70 visual tokens, which four ranks cannot divide
# (LoRA, scale, guidance): the mesh changes with the guidance, while LoRAs are loaded
RUNS: tuple[tuple[str | None, float, float], ...] = (
    (None, 1.0, 1.0), ("wide", 1.0, 1.0), ("wide", 0.5, 3.0), ("narrow", 1.0, 3.0),
    (None, 1.0, 3.0), ("third", 1.0, 3.0), ("wide", 1.0, 1.0), (None, 1.0, 1.0),
)  # fmt: skip


def all_runs(folder: Path, ranks: Ranks) -> list[torch.Tensor]:
    """Latents of every run, on a mesh that fits its guidance, then of one on the bare layers."""
    torch.set_num_threads(1)
    pipe = open_tiny()
    loras = LoraCache(pipe, folder, keep=2)
    mesh: dict[float, Any] = {g: ranks.mesh(ranks.shape_for(g > 1, 12)) for g in (3.0, 1.0)}
    handle, guided = parallelize(pipe.transformer, mesh[1.0]), 1.0
    results = []
    for name, scale, guidance in RUNS:
        with loras.use(name, scale):
            if guidance != guided:
                handle.remove()
                handle, guided = parallelize(pipe.transformer, mesh[guidance]), guidance
            results.append(latents(pipe, guidance, SIDE))
    loras.clear()
    results.append(latents(pipe, guided, SIDE))
    handle.remove()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules()
    )
    return results


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[torch.Tensor]:
    return all_runs(folder, Ranks())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_lora_over_ranks_is_that_of_one_process(
    folder: Path, alone: list[torch.Tensor], tmp_path: Path, size: int
) -> None:
    """Over (cfg, sp) = (2, size / 2) with guidance, (1, size) without."""
    together = run_ranks(size, functools.partial(all_runs, folder), tmp_path / "ranks")
    for results in together:
        for index, (result, single) in enumerate(zip(results, alone, strict=True)):
            error = (result - single).abs().max().item()
            assert error == 0, (index, error)


def run(lora: str | None, scale: float = 1.0, job_id: str = "j") -> Run:
    return Run(
        job_id=job_id, prompt=PROMPT, negative_prompt="", seed=3, num_inference_steps=2,
        guidance_scale=3.0, height=64, width=80, num_frames=7, fps=12, lora=lora, lora_scale=scale,
    )  # fmt: skip


def test_an_engine_takes_a_lora_for_one_run_only(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    name = lora_names(folder)[0]
    engine = Engine(open_tiny(), loras=tmp_path)

    def frames(request: Run) -> str:
        result = engine.run(request, lambda message: None, lambda: False)
        assert result is not None
        return result.frames_hash

    plain = frames(run(None))
    styled = frames(run(name))
    assert styled != plain
    assert frames(run(name, scale=0.5)) not in (plain, styled)
    assert frames(run(None)) == plain
    with pytest.raises(LoraError, match="broken") as refusal:
        frames(run("broken"))
    assert refusal.value.settled
    assert frames(run(name)) == styled
    assert frames(run(None)) == plain
