"""The live state of jobs, and the view of a job: its record, progress, place in the queue, ETA.

All of it is lost with the process, and none of it is needed to resume: the history is the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mochi_app.jobs import Job, JobStatus
from mochi_app.slots.pool import Pool
from mochi_app.store.history import History
from mochi_app.studio import scheduling
from mochi_app.studio.waits import Waits

RECENT_SECONDS = 30.0  # how long a finished job stays in the live state
ETA_SLACK_SECONDS, ETA_SLACK = 2.0, 0.1  # seconds, and share, by which a sent ETA may be off
# The fields of a view that change while a job waits and runs; the rest follow record and files.
PROGRESS = (
    "id", "status", "stage", "step", "steps", "resumed_step", "tile", "tiles", "position",
    "eta_seconds", "waits_for", "cancel_requested",
)  # fmt: skip


@dataclass
class Live:
    """The live state of a claimed job while it runs, and shortly after. Lost with the process."""

    slot: int | None = None
    stage: str = ""
    step: int = 0
    resumed_step: int = 0
    step_seconds: float | None = None
    stage_began: float = 0.0
    began: float = 0.0  # time.monotonic(), when it became PROCESSING
    tiles: tuple[int, int] = (0, 0)  # decoded, of all
    image: str | None = None
    cancel_requested: bool = False
    blameless: bool = False  # if its slot dies, it is not the job's fault
    waits_for: str | None = None  # why its finished video is not in place yet
    ended_at: float | None = None


class LiveJobs:
    """The claimed jobs of this server, by id, and the measured speeds that ETAs come from.

    `waiting` returns the jobs that wait for a slot, oldest first; `lacks` the reason why such a job
    could not start even on a ready slot; `has_video` whether the job with an id has its video.
    """

    def __init__(
        self,
        history: History,
        pool: Pool,
        waiting: Callable[[], list[Job]],
        *,
        lacks: Callable[[Job], str | None],
        has_video: Callable[[str], bool],
    ) -> None:
        self.claimed: set[str] = set()
        self.jobs: dict[str, Live] = {}
        self.speeds = scheduling.Speeds()
        self.waits = Waits()
        self._history = history
        self._pool = pool
        self._waiting = waiting
        self._lacks = lacks
        self._has_video = has_video
        self._places: dict[str, scheduling.Place] = {}
        self._places_key: tuple[int, int] | None = None
        self._moves = 0  # jobs that entered or left the queue

    def queue_moved(self) -> None:
        """A job entered or left the queue: places must be computed again."""
        self._moves += 1

    def claim(self, job_id: str) -> None:
        """The job is about to run."""
        self.claimed.add(job_id)
        self.jobs[job_id] = Live(stage="starting", stage_began=time.monotonic())
        self.queue_moved()

    def release(self, job_id: str) -> None:
        """The run is over; its last state is shown for a while."""
        live = self.jobs[job_id]
        live.ended_at = time.monotonic()
        live.image = None
        self.claimed.discard(job_id)
        self.queue_moved()

    def forget_ended(self) -> None:
        """Drop the state of jobs that ended a while ago, or were removed."""
        waiting = self._history.with_status(JobStatus.PENDING, JobStatus.PROCESSING)
        self.waits.keep({job.id for job in waiting})
        limit = time.monotonic() - RECENT_SECONDS
        for job_id, live in list(self.jobs.items()):
            if live.ended_at is not None and live.ended_at < limit:
                del self.jobs[job_id]

    def view(self, job: Job) -> dict[str, Any]:
        """The job as every entry point shows it: its record, its live state, its file URLs."""
        live = self.jobs.get(job.id) if job.id in self.claimed else None
        place = self._place(job)
        there = job.status is JobStatus.COMPLETED and job.deleted_at is None
        done = job.status is JobStatus.COMPLETED
        missing = there and job.evicted_at is None and not self._has_video(job.id)
        video = there and job.evicted_at is None and not missing
        return job.to_record() | {
            "enhanced": job.enhanced,
            "steps": job.num_inference_steps,
            "step": job.num_inference_steps if done else live.step if live else 0,
            "resumed_step": live.resumed_step if live else job.resumed_step,
            "stage": live.stage if live else "",
            "tile": live.tiles[0] if live else 0,
            "tiles": live.tiles[1] if live else 0,
            "cancel_requested": self.cancelling(job),
            "position": place.position if place else None,
            "eta_seconds": self._eta(job, live, place),
            "waits_for": self._waits_for(job, live),
            "video_missing": missing,
            "video_url": f"/files/{job.id}" if video else None,
            "poster_url": f"/files/{job.id}/poster" if there and job.poster else None,
        }

    def _waits_for(self, job: Job, live: Live | None) -> str | None:
        """Why the job does not start even if a slot is ready, or why its video is not in place."""
        if job.status is JobStatus.PENDING:
            return self._lacks(job) if job.held is None else None
        return live.waits_for if live else None

    def cancelling(self, job: Job) -> bool:
        """Whether the job is about to be cancelled."""
        live = self.jobs.get(job.id) if job.id in self.claimed else None
        wanted = job.cancel_requested or (live is not None and live.cancel_requested)
        return wanted and not job.status.terminal

    def image(self, job_id: str) -> str | None:
        """The newest live picture of a running job, a data URL."""
        live = self.jobs.get(job_id)
        return live.image if live else None

    def _place(self, job: Job) -> scheduling.Place | None:
        if job.status is not JobStatus.PENDING:
            return None
        return self._all_places().get(job.id)

    def _all_places(self) -> dict[str, scheduling.Place]:
        """Places of all waiting jobs; computed when one comes or goes, and every half second."""
        key = (self._moves, int(time.monotonic() * 2))
        if key != self._places_key:
            self._places = scheduling.places(
                self._waiting(), self._busy_seconds(), self.speeds.run_seconds, self.waits.since
            )
            self._places_key = key
        return self._places

    def _busy_seconds(self) -> list[float | None]:
        """Seconds until each slot with a loaded model is free; nothing starts beside a suspect."""
        seconds: list[float | None] = []
        alone = False
        for supervised in self._pool.slots:
            job_id = supervised.slot.job_id
            job = self._history.get(job_id) if job_id else None
            if job is not None:
                seconds.append(self._eta(job, self.jobs.get(job.id), None))
                alone = alone or job.suspect
            elif supervised.ready:
                seconds.append(0.0)
        if alone:
            known = [value for value in seconds if value is not None]
            return [max(known) if len(known) == len(seconds) else None] * len(seconds)
        return seconds

    def _eta(self, job: Job, live: Live | None, place: scheduling.Place | None) -> float | None:
        """Seconds until the job's video is ready; None when unknown."""
        if place is not None:
            return place.eta_seconds and round(place.eta_seconds, 1)
        if live is None or job.status is not JobStatus.PROCESSING:
            return None
        left = self.speeds.run_seconds(job, live.step)
        if left is None and live.step_seconds is not None:
            left = (job.num_inference_steps - live.step) * live.step_seconds
        if left is None:
            return None
        # Stages after the last step report no progress of their own: count their time down.
        idle = time.monotonic() - live.stage_began if live.step == job.num_inference_steps else 0
        return round(max(0.0, left - idle), 1)


def is_news(before: dict[str, Any], after: dict[str, Any], seconds: float) -> bool:
    """Whether a job's view, or its progress, differs from that of `seconds` ago by more than an ETA
    that counted down, within the slack."""
    if before | {"eta_seconds": None} != after | {"eta_seconds": None}:
        return True
    then: float | None = before["eta_seconds"]
    now: float | None = after["eta_seconds"]
    if then is None or now is None:
        return then is not now
    return abs(max(0.0, then - seconds) - now) > max(ETA_SLACK_SECONDS, ETA_SLACK * now)
