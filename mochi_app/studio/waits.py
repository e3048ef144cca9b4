"""Since when each job waits, on a clock that nobody sets: that on the wall may step by a day.

Who is next (`scheduling.py`) and the wait that is measured (`metrics.py`) go by this, not by the
times in the records, which are for people. Kept in memory; what waits at a start has the age that
its record tells, as far as the records of the jobs after it bear that out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from mochi_app.jobs import Job


class Waits:
    """When each job came, in seconds of `clock`; what came before this server has its age."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._since: dict[str, float] = {}

    def begin(self, jobs: Sequence[Job], now: float) -> None:
        """Take in what waits at the start, oldest first; `now` is the wall clock's.

        No job came later than one after it, nor later than now: a submit that says so was written
        when the clock was ahead.
        """
        latest, began = now, self._clock()
        for job in reversed(jobs):
            latest = min(latest, job.submitted_at)
            self._since[job.id] = began - (now - latest)

    def since(self, job: Job) -> float:
        """When the job came; now, when it has just come."""
        return self._since.setdefault(job.id, self._clock())

    def seconds(self, job: Job) -> float:
        """Seconds that this server has seen the job wait."""
        return self._clock() - max(self._began, self.since(job))

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all but these."""
        self._since = {key: since for key, since in self._since.items() if key in job_ids}
