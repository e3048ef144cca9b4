"""Which job is next, its place in the queue, and its ETA. Pure functions of plain data.

Order: a job is due at its arrival plus `RUN_TIMES` times its own estimated run time; the earliest
due goes first. Among equals that is first come, first served. A short job overtakes a long one, but
only for a while: later arrivals are due later, so nothing starves. A job that was interrupted had
its turn already and goes before all that have not. A suspect (`suspects.py`) runs alone: when it is
next it waits for the running jobs, and nothing starts meanwhile or alongside it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from mochi_app.jobs import Job
from mochi_app.setting_types import Timeouts

RUN_TIMES = 4.0
SLACK = 10.0  # times the expected seconds before a run counts as hung
CANCEL_SLACK = 3.0
LEAST_SHARE = 1 / 3  # of a timeout, however fast the machine was measured to be
SMOOTHING = 0.3  # weight of the newest measurement


@dataclass(frozen=True)
class Place:
    """A waiting job's position, 1 being next, and the seconds until its video, None if unknown."""

    position: int
    eta_seconds: float | None


def passes(job: Job) -> int:
    """Transformer passes per step: two with classifier-free guidance, one without."""
    return 2 if job.guidance_scale > 1 else 1


def volume(job: Job) -> int:
    """Pixels × frames of one video."""
    return job.height * job.width * job.num_frames


@dataclass
class Speeds:
    """Measured seconds per unit of work, of this model on these slots; None until measured."""

    denoise: float | None = None  # per step, pass, pixel and frame
    other: float | None = None  # text, decode and encode: per pixel and frame

    def observe(self, job: Job) -> None:
        """Learn from a finished job's `seconds`, which cover only the steps since it resumed."""
        steps = job.num_inference_steps - job.resumed_step
        if "denoise" not in job.seconds or steps < 1:
            return
        other = sum(job.seconds.get(stage, 0.0) for stage in ("text", "decode", "encode"))
        per_step = job.seconds["denoise"] / (steps * passes(job) * volume(job))
        self.denoise = self._mix(self.denoise, per_step)
        self.other = self._mix(self.other, other / volume(job))

    @staticmethod
    def _mix(old: float | None, new: float) -> float:
        return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new

    def step_seconds(self, job: Job) -> float | None:
        """Seconds of one step of the job."""
        return None if self.denoise is None else self.denoise * passes(job) * volume(job)

    def stage_seconds(self, job: Job) -> float | None:
        """Seconds of the job's text, decode and encode together."""
        return None if self.other is None else self.other * volume(job)

    def run_seconds(self, job: Job, steps_done: int = 0) -> float | None:
        """Seconds from step `steps_done` of the job to its video."""
        if self.denoise is None or self.other is None:
            return None
        steps = max(0, job.num_inference_steps - steps_done)
        return volume(job) * (self.denoise * steps * passes(job) + self.other)


def timeouts_for(job: Job, speeds: Speeds, timeouts: Timeouts, usual_volume: int) -> Timeouts:
    """Deadlines of a job, from what this machine needs for such work.

    Until speeds are measured, `timeouts` hold for the usual video of `usual_volume` pixels ×
    frames, and a larger video gets proportionally more time. After that, each is a multiple of the
    expected seconds; a step's is at least a third of the former, a cancel's `timeouts.cancel`.
    """
    larger = max(1.0, volume(job) / usual_volume)
    most = Timeouts(timeouts.step * larger, timeouts.cancel * larger)
    step, stages = speeds.step_seconds(job), speeds.stage_seconds(job)
    if step is None or stages is None:
        return most
    return Timeouts(
        step=max(LEAST_SHARE * most.step, SLACK * max(step, stages)),
        cancel=max(timeouts.cancel, CANCEL_SLACK * step),
    )


Estimate = Callable[[Job], float | None]
Since = Callable[[Job], float]


def submitted(job: Job) -> float:
    """When the job arrived, by the wall clock."""
    return job.submitted_at


def due(job: Job, estimate: Estimate, since: Since = submitted) -> tuple[bool, float, str]:
    """Sort key of a waiting job: interrupted ones first, then the moment it is due, then its id.

    `since` returns when a job arrived, in seconds of any clock (`waits.py`).
    """
    fresh = job.started_processing_at is None
    return (fresh, since(job) + RUN_TIMES * (estimate(job) or 0.0), job.id)


def next_job(
    pending: Iterable[Job],
    estimate: Estimate,
    running: Collection[Job] = (),
    since: Since = submitted,
) -> Job | None:
    """The job to start now alongside those that are `running`, if any."""
    if any(job.suspect for job in running):
        return None
    job = min(pending, key=lambda job: due(job, estimate, since), default=None)
    return None if job is not None and job.suspect and running else job


def places(
    pending: Iterable[Job],
    busy_seconds: Sequence[float | None],
    estimate: Estimate,
    since: Since = submitted,
) -> dict[str, Place]:
    """Place and ETA of every waiting job, by id.

    `busy_seconds` has one entry per slot with a loaded model: seconds until it is free, 0 when
    idle, None when unknown, in which case no ETA is known.
    """
    ordered = sorted(pending, key=lambda job: due(job, estimate, since))
    known = bool(busy_seconds) and None not in busy_seconds
    free_at = [seconds for seconds in busy_seconds if seconds is not None]
    heapq.heapify(free_at)
    result: dict[str, Place] = {}
    for position, job in enumerate(ordered, start=1):
        seconds = estimate(job)
        known = known and seconds is not None
        if not known or seconds is None:
            result[job.id] = Place(position, None)
            continue
        if job.suspect:  # alone
            done_at = max(free_at) + seconds
            free_at = [done_at] * len(free_at)
        else:
            done_at = heapq.heappop(free_at) + seconds
            heapq.heappush(free_at, done_at)
        result[job.id] = Place(position, done_at)
    return result
