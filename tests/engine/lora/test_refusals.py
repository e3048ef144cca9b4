"""Which files of LoRAs are refused, and that a refusal changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiPipeline

from mochi_app.engine.lora import LoraCache
from mochi_app.loras import LoraError
from tests.lora_files import (
    adapters,
    latents,
    rewrite,
    used,
    weights,
    wrapped,
)

LAYER = "transformer.transformer_blocks.0.attn1.to_q"
Tensors = dict[str, torch.Tensor]


def with_key(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: torch.ones(shape)}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        key: tensor for key, tensor in tensors.items() if key != f"{LAYER}.{part}"
    }


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "wrong input": (with_key(f"{LAYER}.lora_A.weight", 2, 7), r"shape \(2, 7\), expected \(2, "),
    "wrong output": (with_key(f"{LAYER}.lora_B.weight", 7, 2), r"lora_B.weight \(shape \(7, 2\)"),
    "wrong rank": (with_key(f"{LAYER}.lora_A.weight", 3, 192), "expected"),
    "no rank": (with_key(f"{LAYER}.lora_A.weight", 0, 192), "expected"),
    "a number": (with_key(f"{LAYER}.lora_A.weight"), "expected"),
    "no B": (without("lora_B.weight"), r"to_q.lora_A.weight \(without its lora_B\)"),
    "no A": (without("lora_A.weight"), r"to_q.lora_B.weight \(without its lora_A\)"),
    "other model": (renamed("transformer_blocks", "blocks"), "no such linear layer.*more$"),
    "other format": (renamed("transformer.transformer_blocks.", "lora_unet_"), "not a LoRA of"),
    "no prefix": (renamed("transformer.transformer_blocks", "transformer_blocks"), "not a LoRA of"),
    "text encoder": (with_key("text_encoder.q.lora_A.weight", 2, 2), "text_encoder.q.lora_A"),
    "no linear": (with_key("transformer.patch_embed.proj.lora_A.weight", 2, 2), "no such linear"),
    "inside": (with_key(f"{LAYER}.base_layer.lora_A.weight", 2, 192), "no such linear"),
    "dora": (with_key(f"{LAYER}.dora_scale", 1), "dora_scale"),
    "twice": (with_key(f"{LAYER}.lora.up.weight", 1), "given twice"),
    "long key": (with_key("x\n" * 500, 1), "x x x.*…"),
    "empty": (lambda tensors: {}, "it has no weights"),
    "not finite": (
        lambda tensors: tensors | {f"{LAYER}.lora_B.weight": torch.full((192, 2), torch.nan)},
        r"not finite: .*to_q.lora_B.weight",
    ),
}


def raw(folder: Path, kind: str) -> bytes:
    """The bytes of a broken file."""
    whole = (folder / "narrow.safetensors").read_bytes()
    return {"no bytes": b"", "truncated": whole[:-10], "half": whole[:300], "pickle": b"\x80\x02."}[
        kind
    ]


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "another kind": ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    "rank": ({"r": 4}, r"to_out.0 \(rank 2, metadata says 4\)"),
    "rank pattern": ({"rank_pattern": {"to_q": 8}}, "metadata says 8"),
    "bad pattern": ({"rank_pattern": {"(": 8}}, "metadata says"),
    "bad alpha": ({"lora_alpha": "x"}, "unsupported operand"),
}


def refused(pipe: MochiPipeline, loras: LoraCache, match: str) -> str:
    """The refusal of the LoRA `bad`; what was loaded before is as it was, and nothing else is."""
    layers, held = wrapped(pipe), adapters(pipe)
    with pytest.raises(LoraError, match=match) as caught, loras.use("bad", 1.0):
        pytest.fail("it was used")
    assert wrapped(pipe) == layers
    assert adapters(pipe) == held
    message = str(caught.value)
    assert message.startswith("LoRA 'bad'")
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    change, match = REFUSED[kind]
    rewrite(folder / "narrow.safetensors", tmp_path / "bad.safetensors", change)
    refused(pipe, LoraCache(pipe, tmp_path), match)
    assert not wrapped(pipe)


def test_a_refusal_leaves_what_was_loaded(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, stock: torch.Tensor
) -> None:
    for name in ("narrow", "bad"):  # `bad` names the layers that `narrow` wraps
        rewrite(
            folder / "narrow.safetensors", tmp_path / f"{name}.safetensors",
            renamed(".lora_", ".base_layer.lora_") if name == "bad" else dict,
        )  # fmt: skip
    loras = LoraCache(pipe, tmp_path)
    narrow = used(pipe, loras, "narrow")
    refused(pipe, loras, "no such linear layer")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)
    loras.clear()


@pytest.mark.parametrize("kind", ["no bytes", "truncated", "half", "pickle"])
def test_a_broken_file_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(raw(folder, kind))
    refused(pipe, LoraCache(pipe, tmp_path), "not a whole safetensors file")


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_would_change_the_model_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    change, match = METADATA[kind]
    record = {
        f"transformer.{key}": value for key, value in ({"r": 2, "lora_alpha": 2} | change).items()
    }
    rewrite(
        folder / "narrow.safetensors", tmp_path / "bad.safetensors", lambda tensors: tensors,
        {"lora_adapter_metadata": json.dumps(record)},
    )  # fmt: skip
    before = weights(pipe)
    refused(pipe, LoraCache(pipe, tmp_path), match)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())


@pytest.mark.parametrize("text", ["{", "[]", '"r"'])
def test_unreadable_metadata_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, text: str
) -> None:
    rewrite(
        folder / "narrow.safetensors", tmp_path / "bad.safetensors", lambda tensors: tensors,
        {"lora_adapter_metadata": text},
    )  # fmt: skip
    refused(pipe, LoraCache(pipe, tmp_path), "metadata is not")
