"""Jobs that may be what ended the server: counted, run alone, and held in the end.

Each job that was PROCESSING when the server died is a suspect: that it takes the whole machine
down, by its memory for one. Pure functions of a job; who calls them when is told in `recovery.py`
and `runs.py`, that a suspect runs alone in `scheduling.py`.

A suspect starts only when nothing else runs, and nothing starts beside it. So every later death is
its own doing, and a death that several jobs share makes nobody's count greater than 1: an innocent
job, however often its neighbours end the server, is never held for it, and is a suspect no longer
once it is made.
"""

from __future__ import annotations

from dataclasses import replace

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict

HELD_DEATHS = 3  # of the server, with no new checkpoint of the job in between


def advanced(job: Job, checkpoint_at: float) -> bool:
    """Whether the job has left a checkpoint, at `checkpoint_at`, since the last death of it."""
    return checkpoint_at not in (0.0, job.checkpoint_at)


def cleared(job: Job) -> Job:
    """The job with nothing that counts against it."""
    return replace(job, deaths=[], server_deaths=0, suspect=False)


def outlived(job: Job, checkpoint_at: float, *, alone: bool) -> Job:
    """A job that is back in the queue because its server died: one more death, and maybe held.

    `checkpoint_at` is when its checkpoint was written, 0 without one; `alone` says that no other
    job ran then.
    """
    if advanced(job, checkpoint_at):
        job = cleared(job)
    deaths = job.server_deaths + 1 if alone else max(1, job.server_deaths)
    held = None
    if deaths >= HELD_DEATHS:
        held = (
            f"the server ended {deaths} times while this job ran, and it came no further:"
            " try it again (retry_job), or cancel it (cancel_job)"
        )
    return replace(
        job,
        checkpoint_at=checkpoint_at,
        server_deaths=deaths,
        suspect=True,
        held=held,
        error="the server ended while it ran",
    )


def released(job: Job) -> Job:
    """A held job that somebody wants tried again. It stays a suspect, and runs alone.

    Raises:
        Conflict: it is not held.
    """
    if job.held is None or job.status is not JobStatus.PENDING:
        raise Conflict(f"job {job.id} is {job.status}: expected one that is held")
    return replace(job, server_deaths=0, held=None, error=None)
