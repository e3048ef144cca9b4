"""Since when each job waits, on a monotonic clock: the wall clock may jump by a day.

The order of jobs (`scheduling.py`) and the measured wait (`metrics.py`) use this, not the times in
the records, which are for people. Kept in memory; a job that waits at a start has the age given by
its record, as far as the records of later jobs confirm it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from mochi_app.jobs import Job


class Waits:
    """When each job arrived, in seconds of `clock`; one from before this server has its age."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._since: dict[str, float] = {}

    def begin(self, jobs: Sequence[Job], now: float) -> None:
        """Add the jobs that wait at the start, oldest first; `now` is the wall clock's time.

        No job arrived later than the one after it, nor later than now: such a record was written
        while the clock was ahead.
        """
        latest, began = now, self._clock()
        for job in reversed(jobs):
            latest = min(latest, job.submitted_at)
            self._since[job.id] = began - (now - latest)

    def since(self, job: Job) -> float:
        """When the job arrived; a new job arrives now."""
        return self._since.setdefault(job.id, self._clock())

    def seconds(self, job: Job) -> float:
        """Seconds that this server has seen the job wait."""
        return self._clock() - max(self._began, self.since(job))

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all other jobs."""
        self._since = {key: since for key, since in self._since.items() if key in job_ids}
