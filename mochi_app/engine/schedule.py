"""Which noise levels a run visits, and at which of them it starts.

Mochi's schedule is linear at first and quadratic from then on; diffusers fixes its two parameters
inside `MochiPipeline`. `MochiScheduler` is the stock Euler scheduler with a plan for one run:

    pipe.scheduler = MochiScheduler.from_config(pipe.scheduler.config)
    with pipe.scheduler.planned(SCHEDULES["fast"]):
        pipe(..., num_inference_steps=8, guidance_scale=1.5)
    with pipe.scheduler.planned(first_step=k):
        pipe(..., latents=after_k_steps)  # num_inference_steps: that of the whole run

The second run ends with the frames of the uninterrupted one, bit for bit: an Euler step draws no
noise. That holds unless something else is carried from step to step, as a cache in the transformer
does. The pipeline numbers the steps it runs from 0, so its callback gets 0 after step k;
`scheduler.sigmas` is sliced to match.

For even n, the default schedule of n steps is exactly every d-th noise level of that of n·d steps:
a short run follows the path of a long one in larger steps. For odd n the path is different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule


@dataclass(frozen=True, slots=True)
class Schedule:
    """Parameters of the linear-quadratic schedule (genmo, `mochi_preview/pipelines.py`).

    `threshold_noise` is the share of the way from noise to video that the linear steps cover,
    `linear_steps` their number; None is half of all, rounded down.

    Raises:
        ValueError: a threshold outside (0, 1), or fewer than one linear step.
    """

    threshold_noise: float = 0.025
    linear_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold_noise < 1:
            raise ValueError(f"threshold_noise {self.threshold_noise}: expected between 0 and 1")
        if self.linear_steps is not None and self.linear_steps < 1:
            raise ValueError(f"linear_steps {self.linear_steps}: expected 1 or more, or None")

    def sigmas(self, num_inference_steps: int) -> list[float]:
        """The share of noise before each step: from 1.0 down; 0.0 after the last is not listed.

        Raises:
            ValueError: fewer than two steps, no step left to be quadratic, or a threshold so high
                that the quadratic part would overshoot and come back.
        """
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps {num_inference_steps}: expected 2 or more")
        if self.linear_steps is not None and self.linear_steps >= num_inference_steps:
            raise ValueError(
                f"num_inference_steps {num_inference_steps}: expected more than the "
                f"{self.linear_steps} linear steps of this schedule"
            )
        sigmas: list[float] = linear_quadratic_schedule(
            num_inference_steps, self.threshold_noise, self.linear_steps
        )
        if any(here <= there for here, there in pairwise([*sigmas, 0.0])):
            raise ValueError(
                f"threshold_noise {self.threshold_noise} with linear_steps {self.linear_steps} "
                f"in {num_inference_steps} steps: expected noise that falls with every step; "
                "lower the threshold or take more linear steps"
            )
        return sigmas


DEFAULT = Schedule()
SCHEDULES = {
    "linear_quadratic": DEFAULT,
    # genmo's fast mode, made for 8 steps at guidance 1.5
    "fast": Schedule(threshold_noise=0.1, linear_steps=6),
}


class MochiScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """The stock scheduler, which follows the plan of the current run.

    Outside `planned` it is the stock scheduler. `schedule` and `first_step` are not part of its
    config, so it is saved as a stock one.
    """

    schedule: Schedule = DEFAULT
    first_step: int = 0
    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @contextmanager
    def planned(self, schedule: Schedule = DEFAULT, first_step: int = 0) -> Iterator[None]:
        """Follow `schedule`, from step `first_step` (0 is the first) on, until the block ends.

        Raises:
            ValueError: a negative step. One beyond the last is refused by `set_timesteps`.
            RuntimeError: another run's plan is active.
        """
        if first_step < 0:
            raise ValueError(f"first_step {first_step}: expected 0 or more")
        if (self.schedule, self.first_step) != (DEFAULT, 0):
            raise RuntimeError(f"a run from step {self.first_step} on {self.schedule} is under way")
        self.schedule, self.first_step = schedule, first_step
        try:
            yield
        finally:
            self.schedule, self.first_step = DEFAULT, 0

    # The pipeline inspects the signature for `sigmas` and `timesteps`.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Prepare for a run like the stock method, but following the plan.

        Sets `timesteps` of shape (steps - first_step,) and `sigmas`, longer by one.

        Raises:
            ValueError: the plan does not fit the number of steps.
        """
        given = next((values for values in (sigmas, timesteps) if values is not None), None)
        steps = num_inference_steps if given is None else len(given)
        if steps is not None and self.first_step >= steps:
            raise ValueError(f"first_step {self.first_step}: expected 0 to {steps - 1}")
        if self.schedule != DEFAULT and steps is not None:
            sigmas, timesteps = self.schedule.sigmas(steps), None
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.timesteps = self.timesteps[self.first_step :]
        self.sigmas = self.sigmas[self.first_step :]
