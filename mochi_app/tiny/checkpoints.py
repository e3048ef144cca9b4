"""State of a training stage: model, averaged weights, optimiser, step, losses; saved together.

A stage that is stopped at any moment resumes from its last checkpoint; pauses (SIGSTOP) do no
harm, because nothing depends on the clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 120.0


@dataclass
class Training:
    """One stage's state. `averaged` follows `model` with an exponential moving average."""

    name: str
    model: torch.nn.Module
    averaged: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    folder: Path
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    decay: float = 0.999

    recent: list[float] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """Where the checkpoint is saved."""
        return self.folder / f"{self.name}.pt"

    def update(self) -> None:
        """Apply the gradients (norm clipped to 1), then update the average."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average()

    def record(self, loss: float) -> None:
        """Record the loss of the step just made."""
        self.recent.append(loss)

    @contextmanager
    def clocked(self, every: int) -> Iterator[None]:
        """Wrap one step: count its time, log every `every` steps, checkpoint when due."""
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began
        if self.step % every == 0:
            loss = sum(self.recent) / len(self.recent)
            self.recent.clear()
            self.losses.append((self.step, loss))
            logger.info("%s %d loss %.4f %.0f s", self.name, self.step, loss, self.seconds)
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def average(self) -> None:
        """Move the averaged weights towards the model's; fast at first."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            ours: list[torch.Tensor] = list(self.averaged.parameters())
            theirs = [parameter.detach() for parameter in self.model.parameters()]
            torch._foreach_lerp_(ours, theirs, 1 - decay)

    def save(self) -> None:
        """Write the checkpoint next to the old one, then replace it."""
        staging = self.path.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
            },
            staging,
        )
        staging.replace(self.path)
        self.saved_at = time.monotonic()

    def resume(self) -> bool:
        """Load the checkpoint if there is one."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        return True


def set_learning_rate(training: Training, steps: int, warmup: int = 100) -> None:
    """Warm up, hold, and fall linearly to a tenth over the last two fifths of `steps`."""
    rise = (training.step + 1) / warmup
    fall = 0.1 + 0.9 * (steps - training.step) / (0.4 * steps)
    factor = max(0.1, min(1.0, rise, fall))
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
