"""The one orchestrator: submit, enhance, cancel, delete, and whatever else a caller can do.

Everything that page, API and HTTP can do is a method here. The history is the source of truth for
jobs, the pool for slots; the studio keeps only live state: which jobs are claimed, at which step
they are, how fast this machine is. `intake.py` turns requests into jobs, `dispatch.py` brings jobs
to slots, and `runs.py` carries out runs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from mochi_app.callers import SYSTEM, Caller
from mochi_app.cancels import to_the_end
from mochi_app.changes import Changes
from mochi_app.errors import HistoryError, without_folders
from mochi_app.jobs import (
    Job,
    JobStatus,
    parse_job_id,
    require_own,
    to_be_cancelled,
    withdrawn,
)
from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameters import REQUEST_FIELDS
from mochi_app.request import (
    Conflict,
    NotFound,
    NotYours,
    refuse,
)
from mochi_app.settings import Settings
from mochi_app.slots.pool import Pool
from mochi_app.store.backups import Backups
from mochi_app.store.history import History
from mochi_app.store.job_index import JobQuery
from mochi_app.store.media import MediaStore
from mochi_app.store.outputs import Outputs
from mochi_app.studio.disk_space import DiskSpace
from mochi_app.studio.dispatch import Dispatch
from mochi_app.studio.intake import Intake
from mochi_app.studio.janitor import Janitor
from mochi_app.studio.live import LiveJobs
from mochi_app.studio.metrics import Metrics
from mochi_app.studio.recovery import Recovery
from mochi_app.studio.retention import Retention
from mochi_app.studio.runs import Runs
from mochi_app.studio.suspects import released
from mochi_app.studio.watching import watch

log = logging.getLogger(__name__)

SPEED_SAMPLE = 20  # finished jobs from which the speeds are learned at start


class Studio:
    """Jobs and slots of this server. All methods run on the event loop."""

    def __init__(
        self,
        settings: Settings,
        defaults: ModelDefaults,
        history: History,
        media: MediaStore,
        pool: Pool,
    ) -> None:
        self.settings = settings
        self.defaults = defaults
        self.history = history
        self.media = media
        self.pool = pool
        self.changed = Changes()
        self.stopping = False
        self.backups = Backups(
            settings.data_dir, hours=settings.backup_hours, kept=settings.backups_kept
        )
        self.live = LiveJobs(
            history, pool, lambda: self.dispatch.waiting,
            lacks=lambda job: self.dispatch.lack(job), has_video=media.has_video,
        )  # fmt: skip
        self.retention = Retention(history, media, self.changed, int(settings.quota_gib * 2**30))
        self.metrics = Metrics(history, media, self.retention, pool)
        self.disk = DiskSpace(media)
        self.outputs = Outputs(media, history, self.changed, len(pool.slots))
        self.checks: list[Callable[[], str | None]] = []  # other parts' reasons in `health`
        self._recovery = Recovery(history, media, self.changed, self.live.claimed)
        self.janitor = Janitor(
            self.live, self.disk, self._recovery, self.retention, settings.trash_hours
        )
        self._runs = Runs(
            settings, defaults, history, media,
            live=self.live, retention=self.retention, outputs=self.outputs, metrics=self.metrics,
            changed=self.changed, stopping=lambda: self.stopping, on_unwritten=self.janitor.call,
        )  # fmt: skip
        self.intake = Intake(
            settings, defaults, history, media,
            live=self.live, disk=self.disk, retention=self.retention, queue_moved=self._queue_moved,
            stopping=lambda: self.stopping,
        )  # fmt: skip
        self.dispatch = Dispatch(
            history, pool,
            live=self.live, disk=self.disk, outputs=self.outputs, retention=self.retention,
            changed=self.changed, execute=self._runs.execute,
            usual_volume=defaults.height * defaults.width * defaults.num_frames,
            stopping=lambda: self.stopping,
        )  # fmt: skip
        pool.on_change = self.changed.beat

    # Start and stop

    async def start(self) -> None:
        """Take over what an earlier process left, then bring up the slots."""
        await self._recovery.take_over()
        self.live.waits.begin(self.history.with_status(JobStatus.PENDING), time.time())
        self._learn_speeds()
        self.janitor.start()
        self.outputs.start()
        self.backups.start()
        self.pool.start()

    def begin_stop(self) -> None:
        """Refuse new jobs and wake all waiters, so that streams can end."""
        self.stopping = True
        self.history.begin_end()
        self.changed.beat()

    async def stop(self) -> None:
        """End the slots; what still runs goes back to PENDING."""
        self.begin_stop()
        await self.janitor.stop()
        await self.backups.stop()
        await self.pool.stop(self.settings.drain_seconds)
        await self.outputs.stop()

    def _learn_speeds(self) -> None:
        query = JobQuery(status=frozenset({JobStatus.COMPLETED}), page_size=SPEED_SAMPLE)
        for job in reversed(self.history.list(query).jobs):
            if job.model == self.settings.model_name:
                self.live.speeds.observe(job)

    # Requests

    @to_the_end
    async def submit(self, *, owner: str = "", **parameters: Any) -> Job:
        """Accept a request as a PENDING job, durable before this returns.

        `parameters` are those of `GenerationRequest.validate`.

        Raises:
            RequestError: a value is not acceptable, or there is no space for another job.
        """
        return await self.intake.submit(owner, parameters)

    @to_the_end
    async def enhance(self, job_id: Any, *, owner: str = "") -> Job:
        """A new job with the same prompt, seed and size as a finished preview, and more steps.

        A second call for the same preview returns its existing enhance.

        Raises:
            RequestError: unknown job, not a finished preview, or no space.
        """
        return await self.intake.enhance(self.find(job_id), owner)

    def _queue_moved(self) -> None:
        self.live.queue_moved()
        self.changed.beat()

    def find(self, job_id: Any) -> Job:
        """The job, unless it is in the trash.

        Raises:
            NotFound: there is none, or it is in the trash, which the message then says to anybody,
                since everybody can see the trash.
            RequestError: not a valid id.
        """
        job = self.history.get(parse_job_id(job_id))
        if job is None:
            raise NotFound(f"job_id: no job has the id {job_id}")
        if job.deleted_at is not None:
            raise NotFound(
                f"job_id: job {job.id} is in the trash: restore_job takes it out of it, until the"
                " trash is emptied"
            )
        return job

    def status(self, job_id: Any) -> dict[str, Any]:
        """The job with its live state. Raises as `find`."""
        return self.view(self.find(job_id))

    def lineage(self, job_id: Any) -> dict[str, dict[str, Any] | None]:
        """Views of the `preview` and the newest `enhance` that the job belongs to, None where there
        is none. Raises as `find`."""
        job = self.find(job_id)
        if job.enhanced:
            parent = self.history.get(job.parent_id or "")
            preview = parent if parent and parent.deleted_at is None else None
            enhance: Job | None = job
        else:
            preview = job
            enhance = max(self.history.children(job.id), key=lambda child: child.id, default=None)
        return {
            "preview": self.view(preview) if preview else None,
            "enhance": self.view(enhance) if enhance else None,
        }

    def list_jobs(
        self,
        *,
        status: Any = None,
        query: Any = None,
        page: Any = 1,
        page_size: Any = 24,
        starred: bool | None = None,
        kind: str | None = None,
        held: bool | None = None,
        deleted: bool = False,
    ) -> dict[str, Any]:
        """A page of jobs, newest first: `jobs`, `total`, `page`, `page_size`.

        `query` selects jobs whose prompt has all of its words, the last one as a prefix.

        Raises:
            RequestError: names the field that is not acceptable.
        """
        statuses: frozenset[JobStatus] | None = None
        if status is not None and status != "":
            if status not in list(JobStatus):
                raise refuse("status", status, "one of " + ", ".join(JobStatus))
            statuses = frozenset({JobStatus(status)})
        found = self.history.list(
            JobQuery(
                status=statuses,
                text="" if query is None else query,
                starred=starred,
                kind=kind,
                held=held,
                deleted=deleted,
                page=page,
                page_size=page_size,
            )
        )
        return {
            "jobs": [self.view(job) for job in found.jobs],
            "total": found.total,
            "page": found.page,
            "page_size": found.page_size,
        }

    @to_the_end
    async def cancel(self, job_id: Any, *, by: Caller = SYSTEM) -> Job:
        """Stop a job, waiting or running; one that has ended is returned as it is.

        Raises:
            NotYours: it is another caller's. Otherwise as `find`.
        """
        job = self.find(job_id)
        if job.status.terminal:
            return job
        require_own(job, by, "cancel")
        if job.id in self.live.claimed:
            live = self.live.jobs[job.id]
            live.cancel_requested = True
            if live.slot is not None:
                self.pool.slots[live.slot].slot.cancel(job.id)
            self.changed.beat()
            try:  # recorded for the next start, should the server crash before the job has stopped
                return await self.history.update(job.id, to_be_cancelled)
            except HistoryError as error:
                log.warning("job %s: its cancel is not written down: %s", job.id, error)
                return job
        self.dispatch.withdrawn[job.id] += 1  # not to be claimed while this is written
        try:
            job = await self.history.update(job.id, withdrawn)
        finally:
            self.dispatch.withdrawn -= Counter([job.id])
        self._queue_moved()
        await self._runs.drop_checkpoint(job.id)
        return job

    async def retry(self, job_id: Any, *, by: Caller = SYSTEM) -> Job:
        """Retry a job: a held one is released with its deaths reset; one that failed or was
        cancelled is replaced by a new job of the caller's.

        Raises:
            Conflict: it is neither.
            NotYours: it is held, and another caller's. Otherwise as `find`, `submit`, `enhance`.
        """
        job = self.find(job_id)
        if job.status in (JobStatus.FAILED, JobStatus.CANCELLED):
            if job.enhanced:
                return await self.enhance(job.parent_id, owner=by.name)
            asked = {name: getattr(job, name) for name in REQUEST_FIELDS}
            return await self.submit(owner=by.name, **asked)
        if job.held is None:
            raise Conflict(
                f"job {job.id} is {job.status}: expected one that is held, or has failed"
            )
        require_own(job, by, "retry")
        return await self._release(job.id)

    @to_the_end
    async def _release(self, job_id: str) -> Job:
        job = await self.history.update(job_id, released)
        self._queue_moved()
        return job

    @to_the_end
    async def star(self, job_id: Any, starred: Any = True) -> Job:
        """Protect a video from eviction, or stop protecting it. Raises as `find`."""
        if not isinstance(starred, bool):
            raise refuse("starred", starred, "true or false")
        self.find(job_id)
        job = await self.history.update(job_id, lambda job: replace(job, starred=starred))
        self.changed.beat()
        return job

    @to_the_end
    async def delete(self, job_id: Any, *, by: Caller = SYSTEM) -> Job:
        """Move an ended job to the trash, which hides it and its files.

        Raises:
            Conflict: it has not ended.
            NotYours: it is another caller's. Otherwise as `find`.
        """
        job = self.find(job_id)
        require_own(job, by, "delete")
        return await self.retention.delete(job)

    @to_the_end
    async def restore(self, job_id: Any, *, by: Caller = SYSTEM) -> Job:
        """Undo a delete; a job that is not in the trash is returned as it is.

        Raises:
            NotFound: the trash has no such job, or no longer.
            NotYours: it is another caller's.
        """
        job = self.history.get(parse_job_id(job_id))
        if job is not None and job.deleted_at is not None:
            require_own(job, by, "restore")
        return await self.retention.restore(job_id)

    @to_the_end
    async def empty_trash(self, *, by: Caller = SYSTEM) -> int:
        """Permanently remove the deleted jobs; returns how many.

        Raises:
            NotYours: login is required, and the caller is not an admin.
        """
        if not by.may_empty_trash:
            raise NotYours("the trash is everybody's: only an admin can empty it")
        return await self.retention.empty_trash()

    def view(self, job: Job) -> dict[str, Any]:
        """The job as every entry point shows it."""
        return self.live.view(job)

    def watch(self, job_id: Any, interval: float = 0.5) -> AsyncIterator[dict[str, Any]]:
        """The job's view whenever it changes; see `watching.watch`.

        Raises as `find`, also when the job is deleted meanwhile.
        """
        return watch(
            lambda: self.find(job_id),
            self.view,
            self.changed,
            stopping=lambda: self.stopping,
            interval=interval,
        )

    def health(self) -> dict[str, Any]:
        """Whether a video can be made now, and if not, why."""
        reasons = []
        if self.stopping:
            reasons.append("the server is stopping")
        if not self.pool.ready_or_busy:
            reasons.append("no slot is ready")
        problems = (self.history.problem, self.outputs.problem)
        reasons += [without_folders(problem) for problem in problems if problem is not None]
        warnings = [self.backups.problem] if self.backups.problem is not None else []
        warnings += self.outputs.warnings
        if not self.retention.can_free_space(0):
            reasons.append("the quota is full of starred videos")
        reasons += filter(None, [self.dispatch.short_of_room, *(check() for check in self.checks)])
        slots = [slot.describe() for slot in self.pool.slots]
        reasons = list(dict.fromkeys(reasons))
        return {"ok": not reasons, "reasons": reasons, "warnings": warnings, "slots": slots}
