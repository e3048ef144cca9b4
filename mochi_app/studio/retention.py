"""Retention of finished jobs: the trash, and the quota for videos.

A record and its files change together, under one lock; files go before the record that names them.

How long a job has been in the trash is counted by the history's uptime, not by the wall clock: a
purge is permanent, a clock may be set forward and back, and one that is wrong at a restart would
empty the whole trash. So only the hours in which a server ran count.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from dataclasses import replace
from typing import Any

from mochi_app.changes import Changes
from mochi_app.disk_errors import reason_of
from mochi_app.jobs import Job, evicted, parse_job_id
from mochi_app.request import Conflict, NotFound, RequestError
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore

log = logging.getLogger(__name__)


class Retention:
    """The ended jobs of one data folder and their files."""

    def __init__(
        self, history: History, media: MediaStore, changed: Changes, quota_bytes: int
    ) -> None:
        self._history = history
        self._media = media
        self._changed = changed
        self.quota_bytes = quota_bytes  # for videos
        self._changing = asyncio.Lock()

    async def delete(self, job: Job) -> Job:
        """Move an ended job to the trash, which hides it and its files.

        Raises:
            Conflict: it has not ended.
            RequestError: the disk refuses.
        """
        if not job.status.terminal:
            raise Conflict(f"job {job.id} is {job.status}: cancel it before deleting it")
        async with self._changing:
            job = await self._history.update(job.id, self._trashed)
            try:
                await asyncio.to_thread(self._media.move_to_trash, job.id)
            except OSError as error:
                await self._stays(job, error)
        self._changed.beat()
        return job

    async def _stays(self, job: Job, refusal: OSError) -> None:
        """Undo a delete whose video cannot be moved to the trash.

        Raises:
            RequestError: always, with the reason.
        """
        await self._history.update(job.id, restored)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._media.take_from_trash, job.id)
        reason = f"its video cannot be moved to the folder withheld ({reason_of(refusal)})"
        raise RequestError(f"job {job.id} is not deleted: {reason}") from refusal

    def _trashed(self, job: Job) -> Job:
        if job.deleted_at is not None:
            return job
        return replace(job, deleted_at=time.time(), deleted_uptime=self._history.uptime)

    async def restore(self, job_id: Any) -> Job:
        """Undo a delete; a job that is not in the trash is returned as it is.

        Raises:
            NotFound: there is no such job, or no longer.
            RequestError: the disk refuses.
        """
        async with self._changing:
            job = self._history.get(parse_job_id(job_id))
            if job is None:
                raise NotFound(f"job_id: the trash has no such job: {job_id}")
            if job.deleted_at is None:
                return job
            await self._history.check()
            try:
                await asyncio.to_thread(self._media.take_from_trash, job.id)
            except OSError as error:
                reason = f"its video cannot be moved to the folder videos ({reason_of(error)})"
                raise RequestError(f"job {job.id} is not restored: {reason}") from error
            job = await self._history.update(job.id, restored)
        self._changed.beat()
        return job

    async def empty_trash(self, older_than_hours: float = 0.0) -> int:
        """Permanently remove jobs, files first, that have been in the trash for that many hours of
        uptime; returns how many."""
        limit = math.inf
        if older_than_hours:
            await self._begin_to_count()
            limit = self._history.uptime - older_than_hours * 3600
        purged = 0
        for job in self._history.trashed():
            async with self._changing:
                purged += await self._purge(job.id, limit)
        return purged

    async def _begin_to_count(self) -> None:
        """Start counting for jobs that an earlier version, or a restore, put into the trash."""
        now = self._history.uptime
        trash = self._history.trashed()
        for job in trash:
            if job.deleted_uptime is None or job.deleted_uptime > now:
                await self._history.update(job.id, lambda job: replace(job, deleted_uptime=now))
        if trash:
            await self._history.keep_uptime()

    async def _purge(self, job_id: str, limit: float) -> bool:
        """Remove a job deleted before the uptime `limit`, unless it was restored or purged
        meanwhile."""
        job = self._history.get(job_id)
        if job is None or job.deleted_at is None or (job.deleted_uptime or 0.0) > limit:
            return False
        await self._history.check()  # never remove a file from another history's folder
        try:
            await asyncio.to_thread(self._media.remove, job.id)
        except OSError as error:  # the others are still removed; this one is retried later
            log.error("job %s: it cannot be removed: %s", job.id, error)
            return False
        await self._history.remove(job.id)
        self._changed.beat()
        return True

    async def purge_next(self) -> bool:
        """Permanently remove the job that has been in the trash longest; False if there is none."""
        async with self._changing:
            return await self._purge_next()

    async def _purge_next(self) -> bool:
        for job in sorted(self._history.trashed(), key=lambda job: job.deleted_uptime or 0):
            if await self._purge(job.id, math.inf):
                return True
        return False

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes are within the quota."""
        return self._media.total_bytes() + size <= self.quota_bytes

    def can_free_space(self, size: int) -> bool:
        """Whether `size` more bytes are within the quota once everything removable is removed."""
        over = self._media.total_bytes() + size - self.quota_bytes
        if over <= 0:
            return True
        for job in itertools.chain(self._history.trashed(), self._history.evictable()):
            over -= self._media.size(job.id)
            if over <= 0:
                return True
        return False

    async def enforce_quota(self) -> None:
        """Keep the videos within the quota, as far as that is possible."""
        await self.free_space(0)

    async def free_space(self, size: int) -> None:
        """Free quota for `size` more bytes: the trash goes first, then the oldest unstarred videos,
        but not their records. Starred videos stay even if the quota is exceeded."""
        while not self.fits(size):
            async with self._changing:
                if not (await self._purge_next() or await self._evict_next()):
                    return

    async def _evict_next(self) -> bool:
        """Remove the oldest unstarred video that exists; False if there is none."""
        for job in self._history.evictable():
            if not self._media.has_video(job.id):
                continue  # removed by somebody else: evicting it frees nothing
            log.info("job %s: video evicted, the quota is full", job.id)
            job = await self._history.update(job.id, evicted)
            if job.evicted_at is not None and not await self._remove_video(job):
                continue
            self._changed.beat()
            return True
        return False

    async def _remove_video(self, job: Job) -> bool:
        """Remove an evicted job's video; if that fails, the eviction is undone."""
        try:
            await asyncio.to_thread(self._media.remove_video, job.id)
        except OSError as error:
            log.error("job %s: its video cannot be removed: %s", job.id, error)
            await self._history.update(job.id, lambda job: replace(job, evicted_at=None))
            return False
        return True


def restored(job: Job) -> Job:
    """The job, out of the trash."""
    return replace(job, deleted_at=None, deleted_uptime=None)
