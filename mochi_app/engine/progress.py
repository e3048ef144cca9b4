"""What a rank reports while it works: stages and steps, and where it checks for a cancel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MochiPipeline

from mochi_app.engine.checkpoint import CheckpointWriter
from mochi_app.engine.previews import PICTURE_SECONDS, LatentColours, forecast, middle
from mochi_app.messages import Latent, Message, Run, Stage, Step

Emit = Callable[[Message], None]


class Stopped(Exception):
    """Unwinds a run that was cancelled."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: at `latents`, with `step` of its steps already done."""

    step: int
    latents: torch.Tensor


@dataclass(frozen=True, slots=True)
class Contact:
    """A run's callbacks: report a message, check for a cancel, wait for the device."""

    emit: Emit
    cancelled: Callable[[], bool]
    synchronize: Callable[[], None]


class StageClock:
    """Announces stages, measures them in seconds, and stops a cancelled run between them."""

    def __init__(self, job_id: str, contact: Contact) -> None:
        self.seconds: dict[str, float] = {}
        self._job_id = job_id
        self._contact = contact

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage, from its announcement to the end of its work on the device."""
        stop_if(self._contact.cancelled)
        self._contact.emit(Stage(job_id=self._job_id, stage=name))
        started = time.perf_counter()
        yield
        self._contact.synchronize()
        self.seconds[name] = time.perf_counter() - started


class StepWatcher:
    """The pipeline's step callback: reports progress, sends pictures, writes checkpoints, and stops
    a cancelled run."""

    def __init__(
        self,
        request: Run,
        start: Start,
        contact: Contact,
        colours: LatentColours | None,
        checkpoints: CheckpointWriter | None,
    ) -> None:
        self._request = request
        self._done = start.step
        self._contact = contact
        self._colours = colours
        self._checkpoints = checkpoints
        self._before = middle(start.latents)
        self._shown_at = -PICTURE_SECONDS
        self._started = time.perf_counter()

    def __call__(
        self, pipe: MochiPipeline, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Called after step `index` of those that this run does, counted from 0."""
        self._contact.synchronize()
        now = time.perf_counter()
        step, steps = self._done + index + 1, self._request.num_inference_steps
        self.settle()
        self._contact.emit(
            Step(job_id=self._request.job_id, step=step, steps=steps, seconds=now - self._started)
        )
        if self._checkpoints is not None and self._checkpoints.due(step) and step < steps:
            self._checkpoints.keep(step, tensors["latents"].detach().float().cpu().clone().numpy())
        if self._colours is not None:
            after = middle(tensors["latents"])
            if now - self._shown_at >= PICTURE_SECONDS:
                self._shown_at = now
                sigmas = pipe.scheduler.sigmas[index : index + 2]
                self._show(step, forecast(self._before, after, sigmas), self._colours)
            self._before = after
        stop_if(self._contact.cancelled)
        self._started = time.perf_counter()
        return tensors

    def _show(self, step: int, clean: torch.Tensor, colours: LatentColours) -> None:
        image = colours.picture(clean, self._request.height, self._request.width)
        self._contact.emit(Latent(job_id=self._request.job_id, step=step, image=image))

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        if self._checkpoints is not None:
            self._checkpoints.settle()


def unsaid(message: Message) -> None:
    """The `emit` of ranks other than the first: drops the message."""


def stop_if(cancelled: Callable[[], bool]) -> None:
    """A boundary: unwind the run if it is cancelled."""
    if cancelled():
        raise Stopped
