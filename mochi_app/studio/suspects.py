"""Jobs that may have killed the server: counted, run alone, and finally held.

Each job that was PROCESSING when the server died is a suspect: it may take the whole machine down,
for example by its memory. Pure functions of a job; `recovery.py` and `runs.py` call them, and
`scheduling.py` makes a suspect run alone.

A suspect starts only when nothing else runs, and nothing starts alongside it. So every later death
is its own fault, and a death that several jobs share raises no count above 1: an innocent job is
never held for it, however often its neighbours kill the server, and stops being a suspect once it
completes.
"""

from __future__ import annotations

from dataclasses import replace

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict

HELD_DEATHS = 3  # of the server, with no new checkpoint of the job in between


def advanced(job: Job, checkpoint_at: float) -> bool:
    """Whether the job has written a checkpoint, at `checkpoint_at`, since its last death."""
    return checkpoint_at not in (0.0, job.checkpoint_at)


def cleared(job: Job) -> Job:
    """The job without deaths or suspicion."""
    return replace(job, deaths=[], server_deaths=0, suspect=False)


def outlived(job: Job, checkpoint_at: float, *, alone: bool) -> Job:
    """A job that is back in the queue because its server died: one more death, and maybe held.

    `checkpoint_at` is when its checkpoint was written, 0 without one; `alone` is whether no other
    job was running.
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
    """A held job, back in the queue. It stays a suspect, and runs alone.

    Raises:
        Conflict: it is not held.
    """
    if job.held is None or job.status is not JobStatus.PENDING:
        raise Conflict(f"job {job.id} is {job.status}: expected one that is held")
    return replace(job, server_deaths=0, held=None, error=None)
