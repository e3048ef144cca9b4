"""Records and files that do not agree: after a crash, or when a record could not be written.

What was asked for is never dropped: a video whose record was to say that it is made is adopted, a
job that nobody runs any more goes back to the queue, unless it was to be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from mochi_app.changes import Changes
from mochi_app.jobs import Job, JobStatus, interrupted, withdrawn
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.suspects import outlived

log = logging.getLogger(__name__)


class Recovery:
    """Has history and media of one data folder agree. `claimed` are the ids of jobs that run."""

    def __init__(
        self, history: History, media: MediaStore, changed: Changes, claimed: Collection[str]
    ) -> None:
        self._history = history
        self._media = media
        self._changed = changed
        self._claimed = claimed

    async def take_over(self) -> None:
        """At the start: go on where an earlier server left off, and have each file be where its
        record says."""
        running = {job.id for job in self._history.with_status(JobStatus.PROCESSING)}
        for job in self._history.with_status(JobStatus.CREATED):
            await self._history.update(job.id, lambda job: job.moved(JobStatus.PENDING))
        for job_id in self._media.job_ids():  # made since, when the record is an older copy's
            found = self._history.get(job_id)
            if found is not None and found.status is JobStatus.PENDING:
                await self._history.update(job_id, lambda job: job.moved(JobStatus.PROCESSING))
        await self.repair(running if self._history.server_died else frozenset())
        going_on = {job.id for job in self._history.with_status(JobStatus.PENDING)}
        await asyncio.to_thread(self._media.sweep_checkpoints, going_on)
        for job_id in {*self._media.job_ids(), *self._media.trashed_ids()}:
            try:
                await asyncio.to_thread(self._put_right, job_id)
            except OSError as error:  # one file is no reason not to start
                log.error("job %s: its video stays as it is: %s", job_id, error)
        await self._tell_of_orphans()

    def _put_right(self, job_id: str) -> None:
        """Have a video be where its record says. Raises OSError."""
        found = self._history.get(job_id)
        if found is None:
            log.warning(
                "video of job %s has no record; left in place, to be adopted by"
                " python -m mochi_app.store restore", job_id,
            )  # fmt: skip
        elif found.status is not JobStatus.COMPLETED:
            self._media.remove(job_id)
        elif found.deleted_at is not None:
            self._media.move_to_trash(job_id)
        else:
            self._media.take_from_trash(job_id)
            if found.evicted_at is not None:
                self._media.remove_video(job_id)

    async def _tell_of_orphans(self) -> None:
        """Remove posters of jobs that have no video, and log what does not fit together."""
        for job_id in await asyncio.to_thread(self._media.poster_ids):
            found = self._history.get(job_id)
            if found is not None and found.status is not JobStatus.COMPLETED:
                try:
                    await asyncio.to_thread(self._media.remove, job_id)
                except OSError as error:
                    log.error("job %s: its poster stays: %s", job_id, error)
        orphans = await asyncio.to_thread(self._media.orphans)
        if orphans:
            log.warning("%d files in videos are not the app's; left: %s", len(orphans), orphans[:5])
        made = self._history.with_status(JobStatus.COMPLETED)
        there = self._media.has_video
        missing = [job.id for job in made if job.evicted_at is None and not there(job.id)]
        if missing:
            log.error("the videos of %d jobs are gone from the disk: %s", len(missing), missing[:5])

    async def repair(self, died_with: Collection[str] = ()) -> None:
        """Put right the jobs that are running, or to be cancelled, on paper only: their server
        died, or the record of their end could not be written. `died_with` are the ids of those
        that ran when the server died: suspects."""
        open_jobs = self._history.with_status(JobStatus.PENDING, JobStatus.PROCESSING)
        for job_id in [job.id for job in open_jobs]:
            job = self._history.get(job_id)  # as it is by now: the others took their time
            if job is None or job.status.terminal or job.id in self._claimed:
                continue
            processing = job.status is JobStatus.PROCESSING
            if not (processing or job.cancel_requested):
                continue
            if processing and self._media.video_path(job.id) is not None:
                log.info("job %s: adopted its finished video", job.id)
                job = await self._history.update(job.id, self._adopted)
            elif job.cancel_requested:
                log.info("job %s: interrupted, and cancelled as was asked", job.id)
                job = await self._history.update(job.id, withdrawn)
            elif job.id in died_with:
                job = await self._suspected(job.id, alone=len(died_with) == 1)
            else:
                log.info("job %s: interrupted, queued again", job.id)
                job = await self._history.update(job.id, interrupted)
            if job.status.terminal:
                await asyncio.to_thread(self._media.remove_checkpoint, job.id)
            self._changed.beat()

    async def _suspected(self, job_id: str, *, alone: bool) -> Job:
        """Back to the queue, or held: the server died while the job ran, `alone` or not."""
        checkpoint_at = await asyncio.to_thread(self._media.checkpoint_time, job_id)
        job = await self._history.update(
            job_id, lambda job: outlived(interrupted(job), checkpoint_at, alone=alone)
        )
        if job.held is None:
            log.warning("job %s: the server ended while it ran; queued again, to run alone", job.id)
        else:
            log.error("job %s is held: %s", job.id, job.held)
        return job

    def _adopted(self, job: Job) -> Job:
        video, poster = self._media.video_path(job.id), self._media.poster_path(job.id)
        return job.moved(
            JobStatus.COMPLETED,
            completed_processing_at=time.time(),
            video=video.name if video else None,
            poster=poster.name if poster else None,
        )
