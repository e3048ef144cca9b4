"""What becomes a job: a request is checked once, room is set aside, and the record is written.

Accepted means durable: a job has its id once it is in the history, beside the room that its video
needs. Who may ask and what is done with the job is told elsewhere (`studio.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mochi_app.disk_errors import reason_of
from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.loras import lora_names
from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameters import PARAMETERS, GenerationRequest, check_schedule
from mochi_app.request import Conflict, RequestError
from mochi_app.settings import Settings
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.disk_space import DiskSpace, video_bytes
from mochi_app.studio.live import LiveJobs
from mochi_app.studio.retention import Retention

# What an enhance takes over from its preview: the same video, but for its steps.
INHERITED = (*(PARAMETERS.keys() - {"num_inference_steps"}), "batch_id", "options")


class Intake:
    """Makes jobs of requests. `queue_moved` is called when one has come to wait; `stopping` says
    whether the server is."""

    def __init__(
        self,
        settings: Settings,
        defaults: ModelDefaults,
        history: History,
        media: MediaStore,
        *,
        live: LiveJobs,
        disk: DiskSpace,
        retention: Retention,
        queue_moved: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._defaults = defaults
        self._history = history
        self._media = media
        self._live = live
        self._disk = disk
        self._retention = retention
        self._queue_moved = queue_moved
        self._stopping = stopping
        self._ids = JobIds(last=history.last_id)
        self._enhancing = asyncio.Lock()
        self._accepting: list[Job] = []  # between the look at the backlog and their record

    async def submit(self, owner: str, parameters: Mapping[str, Any]) -> Job:
        """See `Studio.submit`."""
        loras = []
        if parameters.get("lora"):  # a look at the disk, which may be a slow share
            loras = await asyncio.to_thread(lora_names, self._settings.lora_dir)
            loras += self._lora_of_request(owner, parameters.get("request_id"))
        request = GenerationRequest.validate(
            self._defaults,
            preview_steps=self._settings.preview_steps,
            loras=loras,
            **parameters,
        )
        drawn = frozenset({"seed"} if parameters.get("seed") is None else ())
        job = Job.from_request(request, id=self._ids.draw(), kind="preview", owner=owner)
        return await self._accept(job, drawn)

    def _lora_of_request(self, owner: str, request_id: Any) -> list[str]:
        """What an earlier request of that id asked for: asked again it is answered, its LoRA file
        there or not."""
        known = isinstance(request_id, str) and self._history.find_request(
            owner, request_id.strip()
        )
        return [known.lora] if known and known.lora else []

    async def enhance(self, parent: Job, owner: str) -> Job:
        """See `Studio.enhance`."""
        async with self._enhancing:
            return await self._enhance(parent, owner)

    async def _enhance(self, parent: Job, owner: str) -> Job:
        if parent.enhanced:
            raise Conflict(f"job {parent.id} is an enhance: only a preview can be enhanced")
        if parent.status is not JobStatus.COMPLETED:
            held = f" and held: {parent.held}" if parent.held else ""
            raise Conflict(
                f"job {parent.id} is {parent.status}{held}: expected a COMPLETED preview"
            )
        if parent.model != self._settings.model_name:
            raise Conflict(
                f"job {parent.id} was made by {parent.model}, this server runs"
                f" {self._settings.model_name}: the same seed would give another video"
            )
        steps = self._settings.enhance_steps
        check_schedule(parent.schedule, steps)
        for child in self._history.children(parent.id):
            if self._has_use(child) and child.num_inference_steps == steps:
                return child
        asked = {name: getattr(parent, name) for name in INHERITED}
        job = Job(
            **asked,
            id=self._ids.draw(),
            kind="enhance",
            parent_id=parent.id,
            num_inference_steps=steps,
            owner=owner,
            submitted_at=time.time(),
        )
        return await self._accept(job, frozenset())

    def _has_use(self, job: Job) -> bool:
        """Whether the job has a video, or is going to."""
        if job.status.terminal:
            return job.status is JobStatus.COMPLETED and self._media.has_video(job.id)
        return not self._live.cancelling(job)

    async def _accept(self, job: Job, drawn: frozenset[str]) -> Job:
        known = job.request_id and self._history.find_request(job.owner, job.request_id)
        self._accepting.append(job)
        try:
            if not known:
                await self._require_room(job)
            record = replace(job.moved(JobStatus.PENDING), model=self._settings.model_name)
            accepted = await self._history.add(record, drawn=drawn)
        finally:
            self._accepting.remove(job)
        self._live.waits.since(accepted)
        self._queue_moved()
        return accepted

    async def _require_room(self, job: Job) -> None:
        if self._stopping():
            raise RequestError("the server is stopping: ask again in a moment")
        waiting = self._history.count(JobStatus.PENDING) - self._history.held()
        coming = sum(self._history.get(one.id) is None for one in self._accepting)
        if waiting + coming > self._settings.max_pending:
            raise RequestError(
                f"{waiting} jobs are waiting, the most this server takes: ask again later"
            )
        await self._history.check()
        while (lack := await self._measure(job)) is not None:
            if not await self._retention.purge_next():
                raise RequestError(f"{lack}: delete videos or free the disk")
        promised = sum(video_bytes(one) for one in self._accepted())
        if not self._retention.can_free_space(promised):
            raise RequestError(
                f"the quota of {self._settings.quota_gib:g} GiB is full of starred videos and of"
                " jobs that wait: unstar or delete some"
            )

    def _accepted(self) -> list[Job]:
        """All jobs whose video has yet to be written, also those that are just being accepted. A
        held one is promised no room: tried again, it waits for some like any other."""
        open_jobs = self._history.with_status(JobStatus.PENDING, JobStatus.PROCESSING)
        jobs = [job for job in open_jobs if job.held is None]
        known = {job.id for job in jobs}
        return jobs + [job for job in self._accepting if job.id not in known]

    async def _measure(self, job: Job) -> str | None:
        """Measure the disk; why a new job does not fit beside all that were accepted."""
        try:
            await self._disk.measure()
        except OSError as error:
            raise RequestError(f"the disk does not tell its room: {reason_of(error)}") from error
        return self._disk.lack(job, (one for one in self._accepted() if one.id != job.id))
