"""Mochi's transformer and VAE with random weights, made on the device: for time, memory and shapes.

No file is read, and no weight is ever in host memory but on a CPU. What comes out means nothing,
but it is finite: weights are small and normal, norms scale by one, biases are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

from mochi_app.engine.plan.costs import count_weights, step_activations, video_tokens

SPREAD = 0.02  # standard deviation of a weight


def random_transformer(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> MochiTransformer3DModel:
    """The transformer of a config.json; its rotary frequencies in float32, as the engine has them.

    The same on every rank: all draw from the same seed.
    """
    with torch.device("meta"):
        transformer = MochiTransformer3DModel.from_config(dict(config)).to(dtype)
        transformer.pos_frequencies.data = transformer.pos_frequencies.float()
    randomize(transformer, device)
    return transformer


def random_vae(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> AutoencoderKLMochi:
    """The VAE of a config.json, tiling as the engine has it. The same on every rank."""
    with torch.device("meta"):
        vae = AutoencoderKLMochi.from_config(dict(config)).to(dtype)
    randomize(vae, device)
    vae.enable_tiling()
    return vae


@torch.no_grad()
def randomize(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module from the meta device, which has no numbers, and fill it."""
    module.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0.0, SPREAD, generator=generator)


def random_inputs(
    config: Mapping[str, Any], latent_shape: Sequence[int], samples: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Arguments of a transformer for one step, in float32; all text tokens are valid.

    `latent_shape` is (frames, rows, columns), `samples` 2 for the guided pair and 1 without.
    """
    generator = torch.Generator(device).manual_seed(1)
    length, width = config["max_sequence_length"], config["text_embed_dim"]
    shapes = {
        "hidden_states": (samples, config["in_channels"], *latent_shape),
        "encoder_hidden_states": (samples, length, width),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, device=device)
        for name, shape in shapes.items()
    }
    masks = torch.ones((samples, length), dtype=torch.bool, device=device)
    timestep = torch.full((samples,), 300.0, device=device)
    return inputs | {"timestep": timestep, "encoder_attention_mask": masks}


def layers_that_fit(
    config: Mapping[str, Any], latent_shape: Sequence[int], dtype: torch.dtype, free: int
) -> int:
    """How many layers of the transformer have room in `free` bytes beside a guided step.

    At most those of `config`; 0 or less if not even one has.
    """
    one, two = (meta_weights(config, layers) * dtype.itemsize for layers in (1, 2))
    tokens = video_tokens(config, latent_shape)
    step = step_activations(config, tokens, 1, 1, 0, True, dtype.itemsize)
    fitting = 1 + (free - one - step) // (two - one)
    return min(int(config["num_layers"]), fitting)


def meta_weights(config: Mapping[str, Any], layers: int) -> int:
    """Number of weights with so many layers."""
    with torch.device("meta"):
        return count_weights(MochiTransformer3DModel.from_config({**config, "num_layers": layers}))
