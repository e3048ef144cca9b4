"""Train the text encoder alone: five linear heads read the attributes from the mean of its
outputs.

Trained first and then frozen: a transformer that learns together with its encoder confuses for a
long time which colour belongs to the shape and which to the background.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from mochi_app.tiny import data, words
from mochi_app.tiny.checkpoints import Training, set_learning_rate

BATCH = 64
HEAD_SIZES = (8, 8, 4, 7, 3)  # colour, background, shape, motion, size


class Reader(nn.Module):
    """The encoder with its five heads; only the encoder is kept."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.d_model, n) for n in HEAD_SIZES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each attribute for token ids and mask of shape (B, L)."""
        hidden = self.encoder(ids, attention_mask=mask)[0]
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return [head(mean) for head in self.heads]


def tokens(
    tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, L), padded only to the longest: more padding changes nothing."""
    encoded = tokenizer(captions, padding="longest", truncation=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def start(encoder: T5EncoderModel, work: Path, rate: float = 2e-3) -> Training:
    """A fresh stage over this encoder."""
    reader = Reader(encoder)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["base_lr"] = rate
    return Training("text", reader, copy.deepcopy(reader), [optimizer], work, decay=0.99)


def one_step(
    training: Training, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> float:
    """Make one update; returns its loss."""
    set_learning_rate(training, steps)
    random = data.step_random(seed, "text", training.step)
    chosen = [words.training_attributes(random) for _ in range(BATCH)]
    ids, mask = tokens(tokenizer, [words.random_caption(item, random) for item in chosen])
    labels = torch.tensor(
        [[item.color, item.background, item.shape, item.motion, item.size] for item in chosen]
    )
    logits = training.model(ids, mask)
    loss = torch.stack(
        [nn.functional.cross_entropy(one, labels[:, i]) for i, one in enumerate(logits)]
    ).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    training.update()
    return loss.item()


def run(training: Training, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int) -> None:
    """Train up to `steps`: about a minute."""
    if training.step >= steps:
        return
    while training.step < steps:
        with training.clocked(every=50):
            training.record(one_step(training, tokenizer, seed=seed, steps=steps))
    training.save()
