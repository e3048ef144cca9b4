"""What is decided before weights are read: whether they fit, and in which types."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mochi_app.engine.gpu_memory import MemoryBudget
from mochi_app.engine.loading import LoadError, Precision, warn_of_rounding
from mochi_app.engine.plan import costs, fit
from mochi_app.messages import Configure

CUDA = torch.device("cuda")
FOUR_GPUS = Configure(
    slot=0, rank=0, world_size=4, model="", device="cuda", dtype="auto", scratch="",
    height=480, width=848, num_frames=163,
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of the published model, and no weights."""
    folder = tmp_path_factory.mktemp("published")
    parts = ("transformer", "vae", "text_encoder")
    for name, config in zip(parts, (costs.TRANSFORMER, costs.VAE, costs.TEXT_ENCODER), strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(dict(config)))
    return str(folder)


def test_a_gpu_that_is_too_small_is_told_with_the_figures(published: str) -> None:
    config = replace(FOUR_GPUS, model=published)
    precision = Precision.choose(config, CUDA)
    with pytest.raises(LoadError, match=r"needs 6\d\.\d GB at its peak on rank 0 .*24 GB"):
        MemoryBudget(config, precision, 24_000_000_000).check_start()
    MemoryBudget(config, precision, 80_000_000_000).check_start()


def test_a_video_larger_than_usual_is_measured_against_the_gpu(published: str) -> None:
    config = replace(FOUR_GPUS, model=published)
    budget = MemoryBudget(config, Precision.choose(config, CUDA), 64_000_000_000)
    assert budget.problem(480, 848, 163) == ""
    assert "does not fit" in budget.problem(720, 1280, 325)
    assert MemoryBudget(config, budget.precision, 640_000_000_000).problem(720, 1280, 325) == ""


@pytest.mark.parametrize("size", [(256, 256, 163), (480, 432, 37), (1600, 48, 31)])
def test_what_has_no_more_pixels_than_usual_is_measured_all_the_same(
    published: str, size: tuple[int, int, int]
) -> None:
    """Decoding needs memory by frames and the area of a tile, not by the area of a frame."""
    usual = (480, 848, 31)
    config = replace(FOUR_GPUS, model=published, height=480, width=848, num_frames=31)
    assert math.prod(size) <= math.prod(usual)
    budget = MemoryBudget(config, Precision.choose(config, CUDA), 44_750_000_000)
    budget.check_start()
    assert ("does not fit" in budget.problem(*size)) == (size[2] > 31)


def test_what_is_no_larger_in_any_way_than_the_usual_video_costs_no_plan(
    published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(FOUR_GPUS, model=published)
    budget = MemoryBudget(config, Precision.choose(config, CUDA), 64_000_000_000)
    asked: list[fit.Setting] = []
    monkeypatch.setattr(fit, "check_fit", lambda setting, model: asked.append(setting))
    assert budget.problem(480, 848, 163) == budget.problem(64, 64, 7) == ""
    assert not asked
    budget.problem(496, 64, 7)
    assert len(asked) == 1


@pytest.mark.parametrize("unknown", [{"height": 0}, {"offload": "model"}, {"quantization": "int8"}])
def test_what_is_not_known_beforehand_is_not_refused(
    published: str, unknown: dict[str, object]
) -> None:
    config = replace(FOUR_GPUS, model=published, **unknown)  # type: ignore[arg-type]
    budget = MemoryBudget(config, Precision.choose(config, CUDA), 24_000_000_000)
    budget.check_start()
    assert budget.problem(4800, 8480, 1633) == ""


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({}, "cpu", ("float32", "float32", "float32")),
        ({}, "cuda", ("bfloat16", "float32", "bfloat16")),
        ({"text_dtype": "bfloat16"}, "cuda", ("bfloat16", "bfloat16", "bfloat16")),
        ({"vae_dtype": "float32"}, "cuda", ("bfloat16", "float32", "float32")),
        ({"dtype": "float32"}, "cuda", ("float32", "float32", "float32")),
    ],
)
def test_each_part_has_its_type(
    given: dict[str, str], device: str, expected: tuple[str, str, str]
) -> None:
    chosen = Precision.choose(replace(FOUR_GPUS, **given), torch.device(device))  # type: ignore[arg-type]
    types = (chosen.transformer, chosen.text_encoder, chosen.vae)
    assert tuple(str(dtype).removeprefix("torch.") for dtype in types) == expected


PLAIN = "diffusion_pytorch_model.safetensors"
VARIANT = "diffusion_pytorch_model.bf16.safetensors"
SHARD = "diffusion_pytorch_model.bf16-0000{}-of-00002.safetensors"
B, F, H = torch.bfloat16, torch.float32, torch.float16


def save_weights(folder: Path, files: dict[str, torch.dtype | None]) -> None:
    """A model's transformer, its frequencies of the type that is given for a file, or in none."""
    (folder / "transformer").mkdir()
    for name, stored in files.items():
        tensors = {"other": torch.zeros(1, dtype=torch.bfloat16)}
        if stored:
            tensors["pos_frequencies"] = torch.ones(2, dtype=stored)
        save_file(tensors, folder / "transformer" / name)


@pytest.mark.parametrize(
    ("files", "dtype", "rounded"),
    [
        ({PLAIN: F, VARIANT: B}, B, VARIANT),
        ({VARIANT: B}, F, VARIANT),
        ({SHARD.format(1): None, SHARD.format(2): B}, B, SHARD.format(2)),
    ],
    ids=["variant of both", "variant", "shards"],
)
def test_rotary_frequencies_that_the_files_have_rounded_are_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, torch.dtype | None],
    dtype: torch.dtype,
    rounded: str,
) -> None:
    save_weights(tmp_path, files)
    warn_of_rounding(tmp_path, dtype)
    (told,) = [record.getMessage() for record in caplog.records]
    for part in (rounded, "MOCHI_DTYPE=float32", "MOCHI_MODEL"):
        assert part in told


@pytest.mark.parametrize(
    ("files", "dtype"),
    [
        ({PLAIN: F}, B),
        ({PLAIN: F, VARIANT: B}, F),
        ({VARIANT: F}, B),
        ({PLAIN: H}, B),  # as the embedded model is: there are no other files of it
        ({PLAIN: None}, B),
    ],
    ids=["plain", "plain of both", "exact variant", "float16", "none"],
)
def test_those_that_no_other_file_has_better_are_not(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, torch.dtype | None],
    dtype: torch.dtype,
) -> None:
    save_weights(tmp_path, files)
    warn_of_rounding(tmp_path, dtype)
    assert caplog.records == []
