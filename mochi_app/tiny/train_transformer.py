"""Train the transformer by flow matching on analytic latents, with the frozen text encoder.

In Mochi's direction: x = (1 - s) * noise + s * data, timestep 1000 * s, and the model learns data
- noise (`FlowMatchEulerDiscreteScheduler` with inverted sigmas). Matrices are updated with Muon,
the rest with AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import MochiTransformer3DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from mochi_app.tiny import data
from mochi_app.tiny.attention import use_batched_attention
from mochi_app.tiny.checkpoints import Training, set_learning_rate

BATCH = 32
RATE = 1e-3  # of AdamW; Muon's is twice that
CAPTION_TOKENS = 24
EARLY_SHARE = 0.6  # of the batch is drawn where shape and place are decided: near the noise
EARLY_END = 0.45


class Captions:
    """Frozen text path: captions to embeddings (B, 24, 128) and mask (B, 24)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed at a fixed length, because a compiled step needs fixed shapes."""
        encoded = self.tokenizer(
            captions,
            padding="max_length",
            max_length=CAPTION_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        mask = encoded.attention_mask.bool()
        embedded: torch.Tensor = self.encoder(encoded.input_ids, attention_mask=mask)[0]
        return embedded, mask


def start(transformer: MochiTransformer3DModel, work: Path, rate: float = RATE) -> Training:
    """A fresh stage over this transformer."""
    use_batched_attention(transformer)
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        inside = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=2 * rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    averaged = copy.deepcopy(transformer)
    return Training("transformer", transformer, averaged, [muon, adam], work, decay=0.998)


def draw_times(size: int, generator: torch.Generator) -> torch.Tensor:
    """How far each sample is from noise (0) to data (1), spread evenly over a batch."""
    even = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    even = even[torch.randperm(size, generator=generator)]
    early = torch.rand(size, generator=generator) < EARLY_SHARE
    return torch.where(early, EARLY_END * even.pow(1.5), even)


def loss_of(
    forward: Callable[..., tuple[torch.Tensor]],
    batch: data.LatentBatch,
    embedded: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    """Weighted squared error of the predicted velocity, one number for each sample: shape (B,)."""
    clean = batch.latents
    noise = torch.randn(clean.shape, generator=generator)
    times = draw_times(len(clean), generator)
    s = times.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = forward(
            hidden_states=(1 - s) * noise + s * clean,
            encoder_hidden_states=embedded[0],
            timestep=1000.0 * times,
            encoder_attention_mask=embedded[1],
            return_dict=False,
        )[0]
    error = (velocity.float() - (clean - noise)).square().mean(dim=(1, 2, 3, 4))
    return error * batch.weights / batch.weights.mean()


def run(
    training: Training,
    captions: Captions,
    source: data.LatentSource,
    *,
    seed: int,
    steps: int,
    compiled: bool = True,
) -> None:
    """Train up to `steps`, with checkpoints."""
    forward = torch.compile(training.model) if compiled else training.model
    while training.step < steps:
        with training.clocked(every=25):
            set_learning_rate(training, steps)
            random = data.step_random(seed, "transformer", training.step)
            batch = source.batch(random, BATCH)
            generator = torch.Generator().manual_seed(int(random.integers(2**62)))
            loss = loss_of(forward, batch, captions(batch.captions), generator).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            training.update()
            training.record(loss.item())
    training.save()
