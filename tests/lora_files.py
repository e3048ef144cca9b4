"""LoRA files that fit the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import MochiPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.places import TINY


def open_tiny() -> MochiPipeline:
    """The embedded model through the library's own door."""
    pipe = MochiPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


NARROW = ("attn1.to_q", "attn1.add_v_proj", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")

# What the layout hooks, too: conditioning, and the layer behind which the tokens are gathered
WIDE = (*NARROW, "norm1.linear", "norm_out.linear", "pooler.to_q", "linear_1", "proj_out")


def write_lora(
    folder: Path,
    name: str,
    seed: int,
    layers: tuple[str, ...] = NARROW,
    alpha: int = 2,
    **metadata: Any,
) -> Path:
    """Save a random LoRA of rank 2 as its trainer would; with metadata if its alpha is not 2."""
    transformer = open_tiny().transformer
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=list(layers))
    transformer.add_adapter(config, "trained")
    generator = torch.Generator("cpu").manual_seed(seed)
    weights = get_peft_model_state_dict(transformer, adapter_name="trained")
    weights = {
        key: torch.randn(weight.shape, generator=generator) * 0.1 for key, weight in weights.items()
    }
    record: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    record |= {"peft_type": "LORA"} | metadata
    MochiPipeline.save_lora_weights(
        folder,
        weights,
        weight_name=f"{name}.safetensors",
        transformer_lora_adapter_metadata=record if metadata or alpha != 2 else None,
    )
    return folder / f"{name}.safetensors"
