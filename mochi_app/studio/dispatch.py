"""Which job runs on which slot, and when: a granted ticket pairs a ready slot with a job.

Gradio's queue decides how many turns there are at a time; which job each of them takes is decided
here, by `scheduling.py`. The pool and `runs.py` carry out the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from mochi_app.changes import Changes
from mochi_app.disk_errors import reason_of
from mochi_app.errors import without_folders
from mochi_app.jobs import Job, JobStatus
from mochi_app.logs import about
from mochi_app.slots.pool import Pool, SupervisedSlot
from mochi_app.slots.slot import Slot
from mochi_app.store.history import History
from mochi_app.store.outputs import Outputs
from mochi_app.studio import scheduling
from mochi_app.studio.disk_space import DiskSpace
from mochi_app.studio.live import LiveJobs
from mochi_app.studio.retention import Retention

log = logging.getLogger(__name__)

SPACE_SECONDS = 2.0  # between checks of a disk that is too full for the next job


class Dispatch:
    """The waiting jobs, and the turns that run them.

    `execute` runs a claimed job on a leased slot (`Runs.execute`); `usual_volume` is the pixels ×
    frames of a video of the usual size; `stopping` says whether the server is.
    """

    def __init__(
        self,
        history: History,
        pool: Pool,
        *,
        live: LiveJobs,
        disk: DiskSpace,
        outputs: Outputs,
        retention: Retention,
        changed: Changes,
        execute: Callable[[Slot, Job], Coroutine[Any, Any, bool]],
        usual_volume: int,
        stopping: Callable[[], bool],
    ) -> None:
        self.withdrawn: Counter[str] = Counter()  # by job id: cancels being written
        self._history = history
        self._pool = pool
        self._live = live
        self._disk = disk
        self._outputs = outputs
        self._retention = retention
        self._changed = changed
        self._execute = execute
        self._usual_volume = usual_volume
        self._stopping = stopping
        self._turns = 0  # tickets that are waiting for a run to end

    @property
    def waiting(self) -> list[Job]:
        """Jobs that wait for a slot, oldest first. Held jobs wait for a person instead."""
        taken = self._live.claimed | self.withdrawn.keys()
        pending = self._history.with_status(JobStatus.PENDING)
        able = (job for job in pending if job.held is None and not job.cancel_requested)
        return [job for job in able if job.id not in taken]

    @property
    def tickets_needed(self) -> int:
        """How many tickets should be queued or granted now: one for each run that a ticket waits
        for, and one for each waiting job, up to one more than there are slots in all."""
        if self._stopping():
            return 0
        return min(len(self.waiting) + self._turns, len(self._pool.slots) + 1)

    async def engine_turn(self) -> str | None:
        """A granted ticket: wait for a ready slot and a runnable job, then for the run to end.

        Returns the job's id, None if nothing was left to run. Cancelling the turn does not affect
        the run.
        """
        count = self._changed.count
        while (pair := await self._next_pair()) is None:
            if self._stopping() or not self.waiting:
                return None
            # Space may be freed without a beat: from outside, or by a smaller video than reserved.
            pause = SPACE_SECONDS if self.waits_for_space else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    count = await self._changed.after(count)
        slot, job = pair
        with about(slot=slot.slot.index, job=job.id):
            run = self._pool.run(slot, lambda slot: self._execute(slot, job))
        self._turns += 1
        try:
            await asyncio.shield(run)
        finally:
            self._turns -= 1
        return job.id

    @property
    def starving(self) -> bool:
        """Whether a slot is ready and a job waits for it, but no turn pairs them."""
        ready = self._pool.ready_slot() is not None and not self._stopping()
        return ready and self._next_job() is not None

    @property
    def waits_for_space(self) -> str | None:
        """Why the disk lets no waiting job start, even if a slot is ready."""
        reason = None
        for job in self.waiting:
            if (lack := self.lack(job)) is None:
                return None
            reason = reason or lack
        return reason

    @property
    def short_of_room(self) -> str | None:
        """Why the disk has no space now for the video of a waiting job, or of the usual size."""
        if self.waiting:
            return self.waits_for_space
        return self._disk.lack_for(self._usual_volume)

    async def _next_pair(self) -> tuple[SupervisedSlot, Job] | None:
        if self._pool.ready_slot() is None or not self.waiting or self._unusable:
            return None
        before = self.waits_for_space
        while True:
            try:
                await self._disk.measure()
            except OSError as error:
                self._outputs.met(reason_of(error))
                return None
            pair = self._claim()
            short = None if pair else self.waits_for_space
            if not short or self._unusable or not await self._retention.purge_next():
                break
        if short and not before:
            log.error("no job is started: %s", short)
            self._changed.beat()
        return pair

    def _claim(self) -> tuple[SupervisedSlot, Job] | None:
        """Choose and claim in one step: no await in here."""
        slot = self._pool.ready_slot()
        if slot is None or self._stopping():
            return None
        job = self._next_job()
        if job is None:
            return None
        self._live.claim(job.id)
        return slot, job

    def _next_job(self) -> Job | None:
        """The job to start now alongside those that run, given a ready slot."""
        fitting = [job for job in self.waiting if self.lack(job) is None]
        estimate, since = self._live.speeds.run_seconds, self._live.waits.since
        return scheduling.next_job(fitting, estimate, self._running, since)

    @property
    def _running(self) -> list[Job]:
        """The claimed jobs."""
        found = (self._history.get(job_id) for job_id in self._live.claimed)
        return [job for job in found if job is not None]

    def lack(self, job: Job) -> str | None:
        """Why the disk does not let a waiting job start alongside those that run."""
        return self._unusable or self._short_for(job)

    @property
    def _unusable(self) -> str | None:
        """Why no video can be saved, regardless of free space."""
        problem = self._history.problem or self._outputs.problem
        return problem and without_folders(problem)

    def _short_for(self, job: Job) -> str | None:
        """Why the disk has no space for a waiting job alongside those that run."""
        return self._disk.lack(job, self._running)
