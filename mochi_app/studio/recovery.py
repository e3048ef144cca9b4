"""Recovery of records and files that do not match: after a crash, or a failed write of a record.

No request is dropped: a finished video whose record does not say so yet is adopted, and a job that
no slot runs any more goes back to the queue, unless its cancel was requested.
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
    """Makes history and media of one data folder match. `claimed` has the ids of running jobs."""

    def __init__(
        self, history: History, media: MediaStore, changed: Changes, claimed: Collection[str]
    ) -> None:
        self._history = history
        self._media = media
        self._changed = changed
        self._claimed = claimed

    async def take_over(self) -> None:
        """At the start: continue where an earlier server left off, and move each file to where its
        record says."""
        running = {job.id for job in self._history.with_status(JobStatus.PROCESSING)}
        for job in self._history.with_status(JobStatus.CREATED):
            await self._history.update(job.id, lambda job: job.moved(JobStatus.PENDING))
        for job_id in self._media.job_ids():  # made after the copy that a restore put in place
            found = self._history.get(job_id)
            if found is not None and found.status is JobStatus.PENDING:
                await self._history.update(job_id, lambda job: job.moved(JobStatus.PROCESSING))
        await self.repair(running if self._history.server_died else frozenset())
        going_on = {job.id for job in self._history.with_status(JobStatus.PENDING)}
        await asyncio.to_thread(self._media.sweep_checkpoints, going_on)
        for job_id in {*self._media.job_ids(), *self._media.trashed_ids()}:
            try:
                await asyncio.to_thread(self._put_right, job_id)
            except OSError as error:  # one file must not prevent the start
                log.error("job %s: its video stays as it is: %s", job_id, error)
        await self._report_orphans()

    def _put_right(self, job_id: str) -> None:
        """Move a video to where its record says, or remove it. Raises OSError."""
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

    async def _report_orphans(self) -> None:
        """Remove posters of jobs that have no video, and log what does not match."""
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
        """Repair the records of jobs that are PROCESSING, or to be cancelled, but not claimed:
        their server died, or the record of their end could not be written. `died_with` has the ids
        of the jobs that ran when the server died: suspects."""
        open_jobs = self._history.with_status(JobStatus.PENDING, JobStatus.PROCESSING)
        for job_id in [job.id for job in open_jobs]:
            job = self._history.get(job_id)  # it may have changed during the others' updates
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
        """Requeue or hold a job: the server died while it ran, `alone` or not."""
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
