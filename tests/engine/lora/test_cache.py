"""LoRAs in memory: what each does, who makes room, and that switching one off leaves no trace."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiPipeline

from mochi_app.engine.lora import LoraCache
from mochi_app.loras import LoraError
from tests.lora_files import (
    PROMPT,
    adapters,
    latents,
    open_tiny,
    rewrite,
    used,
    weights,
    wrapped,
    write_lora,
)


def expected(path: Path, scale: float) -> torch.Tensor:
    """What the library makes of a LoRA on a pipeline that nobody used before."""
    pipe = open_tiny()
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="only")
    pipe.set_adapters("only", scale)
    return latents(pipe)


@pytest.fixture
def loras(pipe: MochiPipeline, stock: torch.Tensor, folder: Path) -> Iterator[LoraCache]:
    """A cache of two; afterwards the pipeline is the stock one again."""
    loras = LoraCache(pipe, folder, keep=2)
    yield loras
    loras.clear()
    assert not wrapped(pipe)
    assert not adapters(pipe)


@pytest.mark.parametrize(("name", "scale"), [("narrow", 1.0), ("wide", 0.7)])
def test_a_lora_does_what_the_library_does_bit_for_bit(
    pipe: MochiPipeline,
    loras: LoraCache,
    stock: torch.Tensor,
    folder: Path,
    name: str,
    scale: float,
) -> None:
    result = used(pipe, loras, name, scale)
    assert torch.equal(result, expected(folder / f"{name}.safetensors", scale))
    assert (result - stock).abs().max() > 0.01
    assert torch.equal(used(pipe, loras, name, 0.0), stock)  # adds exactly zero
    assert not torch.equal(used(pipe, loras, name, 0.5 * scale), result)


def test_frames_change(pipe: MochiPipeline, loras: LoraCache) -> None:
    def frames(name: str | None) -> Any:
        with loras.use(name):
            return pipe(
                prompt=PROMPT, height=64, width=64, num_frames=7, num_inference_steps=2,
                guidance_scale=1.0, output_type="np",
                generator=torch.Generator("cpu").manual_seed(1),
            ).frames  # fmt: skip

    assert abs(frames("narrow") - frames(None)).max() > 1 / 255


def test_none_is_exact_after_any_lora_and_any_end_of_a_run(
    pipe: MochiPipeline, loras: LoraCache, stock: torch.Tensor
) -> None:
    before = weights(pipe)
    narrow = used(pipe, loras, "narrow")
    assert wrapped(pipe)
    assert torch.equal(used(pipe, loras, None), stock)
    wide = used(pipe, loras, "wide")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)
    with pytest.raises(RuntimeError, match="in mid-run"), loras.use("wide", 1.0):
        raise RuntimeError("in mid-run")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "wide"), wide)
    loras.clear()
    assert not wrapped(pipe)
    assert torch.equal(latents(pipe), stock)
    after = weights(pipe)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after.keys() == before.keys()


def test_the_least_recently_used_lora_makes_room_and_can_come_back(
    pipe: MochiPipeline, loras: LoraCache, stock: torch.Tensor
) -> None:
    narrow = used(pipe, loras, "narrow")
    with warnings.catch_warnings(action="error"):  # peft warns if the active adapter is deleted
        first = loras.load("narrow"), loras.load("wide")
        assert adapters(pipe) == set(first)
        assert loras.load("narrow") == first[0]
        third = loras.load("third")
        assert adapters(pipe) == {first[0], third}
        again = loras.load("wide")
    assert again == first[1]  # names are used again, so compiled blocks stay valid
    assert adapters(pipe) == {third, again}
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)


def test_a_replaced_file_is_loaded_anew(pipe: MochiPipeline, folder: Path, tmp_path: Path) -> None:
    loras = LoraCache(pipe, tmp_path)
    path = tmp_path / "style.safetensors"
    for name in ("narrow", "third"):
        path.write_bytes((folder / f"{name}.safetensors").read_bytes())  # in place, same size
        os.utime(path, ns=(0, len(name)))
        result = used(pipe, loras, "style")
        assert torch.equal(result, expected(folder / f"{name}.safetensors", 1.0))
        assert len(adapters(pipe)) == 1
    path.write_bytes(b"broken")
    with pytest.raises(LoraError), loras.use("style", 1.0):
        pytest.fail("a broken file was used")
    assert len(adapters(pipe)) == 1
    loras.clear()


def test_an_overwritten_file_does_not_reach_a_loaded_lora(
    pipe: MochiPipeline, folder: Path, tmp_path: Path
) -> None:
    loras = LoraCache(pipe, tmp_path)
    path = tmp_path / "style.safetensors"
    path.write_bytes((folder / "narrow.safetensors").read_bytes())
    with loras.use("style"):
        result = latents(pipe)
        with path.open("r+b") as file:
            file.seek(-100_000 if path.stat().st_size > 100_000 else -1000, os.SEEK_END)
            file.write(b"\x7f" * 1000)
        assert torch.equal(latents(pipe), result)
    loras.clear()


@pytest.mark.parametrize("form", ["alpha", "older keys", "rslora", "dropout"])
def test_other_forms_of_the_same_lora(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, form: str
) -> None:
    """Each is `narrow` times a factor that its alpha gives."""
    path, factor = tmp_path / "form.safetensors", 1.0
    if form == "alpha":
        factor = 3.0 / 2
        rewrite(folder / "narrow.safetensors", path, lambda tensors: tensors | {
            key.replace("lora_A.weight", "alpha"): torch.tensor(3.0)
            for key in tensors if "lora_A" in key
        })  # fmt: skip
    elif form == "older keys":
        rewrite(folder / "narrow.safetensors", path, lambda tensors: {
            key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
            for key, tensor in tensors.items()
        })  # fmt: skip
    elif form == "rslora":
        factor = 2.0**0.5
        write_lora(tmp_path, "form", 0, use_rslora=True)
    else:
        write_lora(tmp_path, "form", 0, lora_dropout=0.5)
    loras = LoraCache(pipe, tmp_path)
    result = used(pipe, loras, "form")
    loras.clear()
    assert torch.allclose(result, used(pipe, LoraCache(pipe, folder), "narrow", factor), atol=1e-4)
    LoraCache(pipe, folder).clear()


@pytest.mark.parametrize("held", [[], ["narrow"]], ids=["empty cache", "one held"])
def test_a_loader_that_fails_half_way_leaves_nothing(
    pipe: MochiPipeline, folder: Path, stock: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
    held: list[str],
) -> None:  # fmt: skip
    loras = LoraCache(pipe, folder)
    results = [used(pipe, loras, name) for name in held]
    before = adapters(pipe)

    def fail(*given: Any, **more: Any) -> None:
        assert adapters(pipe) > before  # it is in by now, without its weights
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("peft.set_peft_model_state_dict", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            loras.load("wide")
    assert adapters(pipe) == before
    assert bool(wrapped(pipe)) == bool(held)
    assert torch.equal(latents(pipe), stock)
    for name, result in zip(held, results, strict=True):
        assert torch.equal(used(pipe, loras, name), result)
    loras.clear()


def test_weights_take_the_type_of_the_transformer(folder: Path) -> None:
    pipe = open_tiny()
    frequencies = pipe.transformer.pos_frequencies.data
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.pos_frequencies.data = frequencies  # in float32, as when the engine loads it
    LoraCache(pipe, folder).load("wide")
    types = {
        weight.dtype
        for name, weight in pipe.transformer.named_parameters()
        if ".lora_" in name
    }  # fmt: skip
    assert types == {torch.bfloat16}


def test_a_cache_without_a_folder_runs_without_loras(pipe: MochiPipeline) -> None:
    with LoraCache(pipe, None).use(None, 1.0):
        assert not wrapped(pipe)
    with pytest.raises(LoraError, match=r"'x': expected one of: \(there are none\)"):
        LoraCache(pipe, None).load("x")
    with pytest.raises(ValueError, match="keep 0"):
        LoraCache(pipe, None, keep=0)
