"""Jobs: `Job`, the life of its `JobStatus`, its id.

Plain data and its rules. Nothing here reads files or the network.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from mochi_app.callers import ANONYMOUS, Caller
from mochi_app.parameters import GenerationRequest, Parameters
from mochi_app.request import Conflict, NotYours, refuse, safe_repr

SCHEMA = 1
MAX_NOTE_CHARS = 2000
JOB_ID = re.compile(r"[0-9a-f]{14}-[0-9a-f]{16}")


class JobStatus(StrEnum):
    """Life of a job. A terminal status never changes."""

    CREATED = "CREATED"
    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether the job has come to its end."""
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


NEXT: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.CREATED: frozenset({JobStatus.PENDING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PENDING: frozenset({JobStatus.PROCESSING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PROCESSING: frozenset(
        {JobStatus.PENDING, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Parameters):
    """One job as it is kept: its parameters and what became of them. Times are Unix seconds;
    `seconds` are durations by stage; `hashes` are SHA-256 of the first latents and of the raw
    frames.

    `video` and `poster` are file names inside their folders, set once the file is in place.
    `deaths` says how slots died of the job with no new checkpoint in between, and `checkpoint_at`
    is the time of the checkpoint that there was at the last of them, 0 for none. `server_deaths`
    counts those of the server likewise; a `suspect` runs alone since the first; `held` says why a
    PENDING job waits for a person and takes no turn (`suspects.py`). `deleted_uptime` is the
    history's uptime at the delete: `deleted_at` is for people, as their clock may have been wrong.
    `resumed_step` is the step after which the run went on that made the video. `cancel_requested`
    says that a cancel was requested: whoever finds the job not running cancels it.
    """

    id: str
    kind: str
    submitted_at: float
    schema: int = SCHEMA
    request_id: str | None = None
    batch_id: str | None = None
    parent_id: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    status: JobStatus = JobStatus.CREATED
    started_processing_at: float | None = None
    completed_processing_at: float | None = None
    attempts: int = 0
    error: str | None = None
    starred: bool = False
    note: str = ""
    safety: str | None = None
    deleted_at: float | None = None
    deleted_uptime: float | None = None
    evicted_at: float | None = None
    model: str = ""
    slot: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    video: str | None = None
    poster: str | None = None
    deaths: Sequence[str] = field(default_factory=list)
    checkpoint_at: float = 0.0
    server_deaths: int = 0
    suspect: bool = False
    held: str | None = None
    resumed_step: int = 0
    cancel_requested: bool = False

    @classmethod
    def from_request(cls, request: GenerationRequest, *, id: str, kind: str, **extra: Any) -> Job:
        """A CREATED job for a validated request."""
        asked = {item.name: getattr(request, item.name) for item in fields(request)}
        return cls(**(asked | {"id": id, "kind": kind, "submitted_at": time.time()} | extra))

    @property
    def enhanced(self) -> bool:
        """Whether this is the many-step version of a preview."""
        return self.kind == "enhance"

    @property
    def cost(self) -> int:
        """Work in steps × pixels × frames: what scheduling and speed measurements count."""
        return self.num_inference_steps * self.height * self.width * self.num_frames

    def moved(self, status: JobStatus, **changes: Any) -> Job:
        """This job in `status`, with `changes`. Nothing holds one that ends, and nothing counts
        against one that is made.

        Raises:
            Conflict: the life of a job has no such move.
        """
        if status not in NEXT[self.status]:
            raise Conflict(f"job {self.id} is {self.status}: it cannot become {status}")
        kept: dict[str, Any] = {"held": None} if status.terminal else {}
        if status is JobStatus.COMPLETED:
            kept |= {"server_deaths": 0, "suspect": False}
        return replace(self, status=status, **(kept | changes))

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        return {name: getattr(self, name) for name in JOB_FIELDS}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Job:
        """Read a record of this schema or an earlier one; fields it lacks take their defaults.

        Raises:
            ValueError: the record is of a later schema, or lacks a field that has no default.
        """
        if (record.get("schema") or 0) > SCHEMA:
            raise ValueError(
                f"job record of schema {record['schema']}: this version reads up to {SCHEMA}"
            )
        known = {name: record[name] for name in JOB_FIELDS if name in record}
        try:
            return cls(**(known | {"status": JobStatus(record["status"]), "schema": SCHEMA}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"job record {safe_repr(record.get('id'))}: {error}") from error


JOB_FIELDS: tuple[str, ...] = tuple(item.name for item in fields(Job))


class JobIds:
    """Draws job ids: 14 hex digits of microseconds, never going back, and 64 random bits."""

    def __init__(self, last: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._last = int(last[:14], 16) if last else 0
        self._clock = clock

    def draw(self) -> str:
        """A new id, greater than every earlier one of this instance and than `last`."""
        self._last = max(int(self._clock() * 1e6), self._last + 1)
        return f"{self._last:014x}-{secrets.token_hex(8)}"


def parse_job_id(value: Any) -> str:
    """`value` if it has the form of a job id.

    Raises:
        RequestError: it has not; nothing was looked up.
    """
    if not isinstance(value, str) or not JOB_ID.fullmatch(value):
        raise refuse("job_id", value, "the id that submit_job returned")
    return value


def cancelled(job: Job) -> Job:
    """The move to CANCELLED."""
    return job.moved(JobStatus.CANCELLED, completed_processing_at=time.time())


def withdrawn(job: Job) -> Job:
    """CANCELLED, unless the job has ended meanwhile."""
    return job if job.status.terminal else cancelled(job)


def to_be_cancelled(job: Job) -> Job:
    """The job with the wish written down, unless it has ended."""
    return job if job.status.terminal else replace(job, cancel_requested=True)


def interrupted(job: Job) -> Job:
    """Back to the queue through no fault of the job: the attempt does not count."""
    return job.moved(
        JobStatus.PENDING,
        attempts=max(0, job.attempts - 1),
        slot=None,
    )


def evicted(job: Job) -> Job:
    """Without its video from now on, unless it was starred or deleted meanwhile."""
    kept = job.starred or job.deleted_at is not None
    return job if kept else replace(job, evicted_at=time.time())


def require_own(job: Job, by: Caller, act: str) -> None:
    """See that the job is the caller's to `act` on.

    Raises:
        NotYours: it is not; the message says whose it is, and who can.
    """
    if by.owns(job.owner):
        return
    if job.owner.startswith(ANONYMOUS):
        raise NotYours(
            f"job {job.id} was asked for in another browser: {act} it there, or have an admin,"
            " or the holder of MOCHI_API_TOKEN, do it"
        )
    raise NotYours(f"job {job.id} is {job.owner}'s: only {job.owner} or an admin can {act} it")
