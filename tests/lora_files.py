"""LoRA files that fit the embedded model, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import MochiPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_app.engine.lora import LoraCache
from tests.places import TINY

PROMPT = "a red ball rolls right"


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


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Save `source` with other tensors; with its own metadata if None is given."""
    with safe_open(source, framework="pt") as file:
        own = file.metadata()
    save_file(dict(change(load_file(source))), target, own if metadata is None else metadata)


def latents(pipe: MochiPipeline, guidance: float = 3.0, side: int = 64) -> torch.Tensor:
    """Last latents of a short run: `side` x 80 pixels, 7 frames, 2 steps."""
    result: torch.Tensor = pipe(
        prompt=PROMPT, negative_prompt="", height=side, width=80, num_frames=7,
        num_inference_steps=2, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).frames  # fmt: skip
    return result


def wrapped(pipe: MochiPipeline) -> set[str]:
    """Names of the layers that hold an adapter."""
    return {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def adapters(pipe: MochiPipeline) -> set[str]:
    """Every adapter that any layer, or the configuration, still has."""
    found = set(getattr(pipe.transformer, "peft_config", {}))
    for module in pipe.transformer.modules():
        if isinstance(module, BaseTunerLayer):
            found.update(module._all_available_adapter_names())
    return found


def weights(pipe: MochiPipeline) -> dict[str, torch.Tensor]:
    """A copy of the transformer's own weights, by their names in the stock model."""
    return {
        name.replace(".base_layer.", "."): weight.clone()
        for name, weight in pipe.transformer.state_dict().items()
        if ".lora_" not in name
    }


def used(pipe: MochiPipeline, loras: LoraCache, name: str | None, scale: float = 1.0) -> Any:
    """Latents with a LoRA from the cache."""
    with loras.use(name, scale):
        return latents(pipe)
