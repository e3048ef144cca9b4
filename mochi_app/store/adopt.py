"""Records made from videos: of jobs that a restored history does not know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from mochi_app.errors import MediaError
from mochi_app.jobs import Job, JobStatus, parse_job_id
from mochi_app.parameters import read_parameters
from mochi_app.request import RequestError, check_text, safe_repr
from mochi_app.store.checks import JOB, Record, Rows
from mochi_app.store.job_index import JobIndex
from mochi_app.store.media import VIDEO_SUFFIX, MediaStore
from mochi_app.store.metadata import read_metadata

MAX_MODEL_CHARS = 2000
WAITING = (JobStatus.CREATED, JobStatus.PENDING, JobStatus.PROCESSING)


# Mending


@dataclass(slots=True)
class Followed:
    """How the records followed the videos."""

    adopted: int = 0  # videos that had no record
    ended: int = 0  # jobs that waited on paper and have their video
    gone: int = 0  # jobs whose video is gone
    strange: list[str] = field(default_factory=list)  # videos that tell too little of themselves


def follow_videos(media: MediaStore, index: JobIndex) -> tuple[Rows, Followed]:
    """What must change in the records so that they tell of the videos that are there."""
    followed = Followed()
    present, trashed = set(media.job_ids()), set(media.trashed_ids())
    changed: list[Job] = []
    for job_id in sorted(present | trashed):
        path = (media.videos if job_id in present else media.trash) / (job_id + VIDEO_SUFFIX)
        try:
            job = followed_job(job_id, path, index.get(job_id), followed)
        except (MediaError, RequestError) as error:
            followed.strange.append(f"{path.name} ({error})")
            continue
        if job_id in present:
            job = replace(job, deleted_at=None, deleted_uptime=None)
        elif job.deleted_at is None:
            job = replace(job, deleted_at=time.time(), deleted_uptime=None)
        if job != index.get(job_id):
            poster = media.poster_path(job_id)
            changed.append(replace(job, video=path.name, poster=poster.name if poster else None))
    for job in index:
        if job.video and job.evicted_at is None and job.id not in present | trashed:
            changed.append(replace(job, evicted_at=time.time()))
            followed.gone += 1
    return {JOB + job.id: job.to_record() for job in changed}, followed


def followed_job(job_id: str, path: Path, job: Job | None, followed: Followed) -> Job:
    """The job whose video is at `path`, as its record should be.

    Raises:
        MediaError, RequestError: there is no record, and the video does not tell one.
    """
    made_at = path.stat().st_mtime
    if job is None:
        job = rebuilt(job_id, read_metadata(path), made_at)
        followed.adopted += 1
    elif job.status in WAITING:
        job = finished(job, made_at)
        followed.ended += 1
    return job


def finished(job: Job, at: float) -> Job:
    """A job that waited when the copy was made and was done since."""
    return replace(
        job,
        status=JobStatus.COMPLETED,
        completed_processing_at=at,
        attempts=max(1, job.attempts),
        server_deaths=0,
        suspect=False,
        held=None,
    )


def rebuilt(job_id: str, metadata: Record, at: float) -> Job:
    """The COMPLETED job that a video tells of itself; `at` is when it was made, Unix seconds.

    Owner, request_id, star and note are not in a video and are lost.

    Raises:
        RequestError: it tells too little, or what no job of this app has.
    """
    if metadata.get("job_id") != job_id:
        raise RequestError(f"it is the video of job {safe_repr(metadata.get('job_id'))}")
    kind, parent = metadata.get("kind"), metadata.get("parent_id")
    if kind not in ("preview", "enhance"):
        raise RequestError(f"kind: got {safe_repr(kind)}, expected preview or enhance")
    return Job(
        **read_parameters(metadata),
        id=job_id,
        kind=kind,
        parent_id=None if parent is None else parse_job_id(parent),
        submitted_at=int(job_id[:14], 16) / 1e6,  # ids begin with the microsecond they were drawn
        status=JobStatus.COMPLETED,
        completed_processing_at=at,
        attempts=1,
        model=check_text("model", metadata.get("model", ""), least=0, most=MAX_MODEL_CHARS),
    )
