"""Train the VAE's decoder: a plain regression from analytic latents to rendered frames.

The encoder needs no training (`latents.write_encoder`). Frames always have the final size, because
the group norms' statistics depend on it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi

from mochi_app.tiny import data, latents
from mochi_app.tiny.checkpoints import Training, set_learning_rate

CLIP_FRAMES = 13
NOISE = 0.08  # in units of the normalised latents: about what the transformer leaves


def start(vae: AutoencoderKLMochi, work: Path, rate: float = 1e-3) -> Training:
    """A fresh stage over the decoder of this VAE."""
    decoder = vae.decoder
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for group in optimizer.param_groups:
        group["base_lr"] = rate
    return Training("decoder", decoder, copy.deepcopy(decoder), [optimizer], work)


def example(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, 12, t, 12, 12) and frames (B, 3, T, 96, 96); every fourth batch a whole video."""
    random = data.step_random(seed, "decoder", step)
    frames = data.clips(random, 1, 31) if step % 4 == 3 else data.clips(random, 2, CLIP_FRAMES)
    exact = latents.normalise(latents.analytic_latents(frames))
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    amount = NOISE * torch.rand((len(exact), 1, 1, 1, 1), generator=generator)
    noisy = exact + amount * torch.randn(exact.shape, generator=generator)
    return latents.denormalise(noisy), frames


def loss_of(decoder: torch.nn.Module, codes: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute plus twice the mean squared error over the frames that the pipeline keeps."""
    with torch.autocast("cpu", torch.bfloat16):
        decoded, _ = decoder(codes)
    error = decoded[:, :, latents.TEMPORAL - 1 :].float() - frames
    loss: torch.Tensor = error.abs().mean() + 2.0 * error.square().mean()
    return loss


def one_step(training: Training, *, seed: int, steps: int) -> float:
    """Make one update; returns its loss."""
    set_learning_rate(training, steps)
    codes, frames = example(seed, training.step)
    loss = loss_of(training.model, codes, frames)
    loss.backward()  # type: ignore[no-untyped-call]
    training.update()
    return loss.item()


def run(training: Training, *, seed: int, steps: int) -> None:
    """Train up to `steps`, with checkpoints."""
    while training.step < steps:
        with training.clocked(every=50):
            training.record(one_step(training, seed=seed, steps=steps))
    training.save()
