"""The one orchestrator: submit, enhance, cancel, delete, and a granted ticket's turn at a slot.

Everything that a door (page, API, HTTP) can do is a method here. The history is the truth about
jobs, the pool about slots; the studio keeps only what is alive now: which jobs are claimed, at
which step they are, how fast this machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from mochi_app import __version__, scheduling
from mochi_app.engine import messages
from mochi_app.engine.pool import Pool, SupervisedSlot
from mochi_app.engine.slot import JobCancelled, JobFailed, Slot, SlotDied
from mochi_app.history import History, HistoryError, JobQuery
from mochi_app.jobs import (
    Conflict,
    GenerationRequest,
    Job,
    JobIds,
    JobStatus,
    NotFound,
    RequestError,
    parse_job_id,
    refuse,
    text,
    walkable,
    whole,
)
from mochi_app.loras import lora_names
from mochi_app.media import MediaError, MediaStore
from mochi_app.pulse import Pulse
from mochi_app.settings import ModelDefaults, Settings

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
MAX_PAGE_SIZE = 100
MAX_QUERY_CHARS = 200
RECENT_SECONDS = 30.0  # how long a finished job stays in the live state
JANITOR_SECONDS = 60.0
FREE_DISK_MARGIN = 256 << 20  # bytes
BYTES_PER_PIXEL_FRAME = 0.25  # more than any video at our quality has needed
SPEED_SAMPLE = 20  # finished jobs that teach the speeds at start
# What an enhance takes over from its preview.
INHERITED = (
    "batch_id", "prompt", "negative_prompt", "seed", "guidance_scale", "height", "width",
    "num_frames", "fps", "schedule", "lora", "lora_scale", "options",
)  # fmt: skip
STORE_PAUSE_SECONDS = 1.0  # so that a store that refuses writes is not tried in a tight loop


@dataclass
class Live:
    """What is known of a claimed job while it runs, and shortly after. Lost with the process."""

    slot: int | None = None
    stage: str = ""
    step: int = 0
    step_seconds: float | None = None
    stage_began: float = 0.0
    tiles: tuple[int, int] = (0, 0)  # decoded, of all
    image: str | None = None
    cancel_requested: bool = False
    ended_at: float | None = None


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
        self.changed = Pulse()
        self.stopping = False
        self.speeds = scheduling.Speeds()
        self._ids = JobIds(last=history.last_id)
        self._live: dict[str, Live] = {}
        self._claimed: set[str] = set()
        self._withdrawn: set[str] = set()
        self._places: dict[str, scheduling.Place] = {}
        self._places_key: tuple[int, int] | None = None
        self._queue_moves = 0  # jobs that came to the queue or left it
        self._janitor: asyncio.Task[None] | None = None
        self._housework = asyncio.Event()  # set when the janitor should not wait for its hour
        self._files = asyncio.Lock()  # a record and its files change together
        self._enhancing = asyncio.Lock()
        self._accepting = 0  # submits between the look at the backlog and their record
        self._turns = 0  # tickets that see a run to its end
        pool.on_change = self.changed.beat

    # Start and stop

    async def start(self) -> None:
        """Take over what an earlier process left, then bring up the slots."""
        await self._recover()
        self._learn_speeds()
        self._janitor = asyncio.create_task(self._keep_house(), name="janitor")
        self.pool.start()

    def begin_stop(self) -> None:
        """Refuse new jobs and wake everybody who waits, so that streams can end."""
        self.stopping = True
        self.changed.beat()

    async def stop(self) -> None:
        """End the slots; what still runs goes back to PENDING."""
        self.begin_stop()
        if self._janitor is not None:
            self._janitor.cancel()
            await asyncio.gather(self._janitor, return_exceptions=True)
        await self.pool.stop(self.settings.drain_seconds)

    async def _recover(self) -> None:
        """Adopt finished files, requeue interrupted jobs, remove what a cancel left behind."""
        for job in self.history.with_status(JobStatus.CREATED):
            await self.history.update(job.id, lambda job: job.moved(JobStatus.PENDING))
        await self._mend_ownerless()
        for job_id in self.media.job_ids():
            found = self.history.get(job_id)
            if found is None:
                log.warning("video of job %s has no record; left in place", job_id)
            elif found.status is not JobStatus.COMPLETED:
                await asyncio.to_thread(self.media.remove, job_id)
            elif found.deleted_at is not None:
                await asyncio.to_thread(self.media.withhold, job_id)
            elif found.evicted_at is not None:
                await asyncio.to_thread(self.media.remove_video, job_id)
        for job_id in self.media.withheld_ids():
            found = self.history.get(job_id)
            if found is not None and found.deleted_at is None:
                await asyncio.to_thread(self.media.unwithhold, job_id)

    async def _mend_ownerless(self) -> None:
        """Adopt or requeue jobs that are PROCESSING on paper only: their server died, or the
        record of their end could not be written."""
        for job in self.history.with_status(JobStatus.PROCESSING):
            if job.id in self._claimed:
                continue
            if self.media.video_path(job.id) is not None:
                log.info("job %s: adopted its finished video", job.id)
                await self.history.update(job.id, self._adopted)
            else:
                log.info("job %s: interrupted, queued again", job.id)
                await self.history.update(job.id, interrupted)
            self.changed.beat()

    def _adopted(self, job: Job) -> Job:
        video, poster = self.media.video_path(job.id), self.media.poster_path(job.id)
        return job.moved(
            JobStatus.COMPLETED,
            completed_processing_at=time.time(),
            video=video.name if video else None,
            poster=poster.name if poster else None,
        )

    def _learn_speeds(self) -> None:
        query = JobQuery(status=frozenset({JobStatus.COMPLETED}), page_size=SPEED_SAMPLE)
        for job in reversed(self.history.list(query).jobs):
            if job.model == self.settings.model_name:
                self.speeds.observe(job)

    async def _keep_house(self) -> None:
        while True:
            try:
                await self._mend_ownerless()
                await self.empty_trash(older_than_hours=self.settings.trash_hours)
                await self._enforce_quota()
                self._forget_ended()
            except Exception:
                log.exception("housekeeping failed; it is tried again")
                await asyncio.sleep(STORE_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._housework.wait(), JANITOR_SECONDS)
            self._housework.clear()

    def _forget_ended(self) -> None:
        limit = time.monotonic() - RECENT_SECONDS
        ended = [key for key, live in self._live.items() if (live.ended_at or limit + 1) < limit]
        for job_id in ended:
            del self._live[job_id]

    # What people ask for

    async def submit(self, *, owner: str = "", **parameters: Any) -> Job:
        """Accept a request as a PENDING job, durable before this returns.

        `parameters` are those of `GenerationRequest.validate`.

        Raises:
            RequestError: a value is not acceptable, or there is no room for another job.
        """
        loras = []
        if parameters.get("lora"):  # a look at the disk, which may be a slow share
            loras = await asyncio.to_thread(lora_names, self.settings.lora_dir)
        request = GenerationRequest.validate(
            self.defaults,
            preview_steps=self.settings.preview_steps,
            loras=loras,
            **parameters,
        )
        drawn = frozenset({"seed"} if parameters.get("seed") is None else ())
        job = Job.from_request(request, id=self._ids.draw(), kind="preview", owner=owner)
        return await self._accept(job, drawn)

    async def enhance(self, job_id: Any, *, owner: str = "") -> Job:
        """A new job with the same prompt, seed and size as a finished preview, and more steps.

        Asked twice for one preview, it answers with the enhance that exists.

        Raises:
            RequestError: unknown job, not a finished preview, or no room.
        """
        async with self._enhancing:
            return await self._enhance(self.find(job_id), owner)

    async def _enhance(self, parent: Job, owner: str) -> Job:
        if parent.enhanced:
            raise Conflict(f"job {parent.id} is an enhance: only a preview can be enhanced")
        if parent.status is not JobStatus.COMPLETED:
            raise Conflict(f"job {parent.id} is {parent.status}: expected a COMPLETED preview")
        if parent.model != self.settings.model_name:
            raise Conflict(
                f"job {parent.id} was made by {parent.model}, this server runs"
                f" {self.settings.model_name}: the same seed would give another video"
            )
        steps = self.settings.enhance_steps
        walkable(parent.schedule, steps)
        for child in self.history.children(parent.id):
            gone = child.status in (JobStatus.FAILED, JobStatus.CANCELLED)
            if not gone and child.num_inference_steps == steps:
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

    async def _accept(self, job: Job, drawn: frozenset[str]) -> Job:
        known = job.request_id and self.history.find_request(job.owner, job.request_id)
        self._accepting += 1
        try:
            if not known:
                await self._require_room(job)
            job = replace(job.moved(JobStatus.PENDING), model=self.settings.model_name)
            job = await self.history.add(job, drawn=drawn)
        finally:
            self._accepting -= 1
        self._queue_moved()
        return job

    def _queue_moved(self) -> None:
        self._queue_moves += 1
        self.changed.beat()

    async def _require_room(self, job: Job) -> None:
        if self.stopping:
            raise RequestError("the server is stopping: ask again in a moment")
        waiting = self.history.count(JobStatus.PENDING)
        if waiting + self._accepting > self.settings.max_pending:
            raise RequestError(
                f"{waiting} jobs are waiting, the most this server takes: ask again later"
            )
        needed = FREE_DISK_MARGIN + int(scheduling.volume(job) * BYTES_PER_PIXEL_FRAME)
        free = await asyncio.to_thread(self.media.free_bytes)
        if free < needed:
            raise RequestError(
                f"the disk has {free / 2**30:.1f} GiB free, this video needs"
                f" {needed / 2**30:.1f} GiB: delete videos or free the disk"
            )
        if self.media.total_bytes() >= self.quota_bytes and not self.history.evictable(1):
            raise RequestError(
                f"the quota of {self.settings.quota_gib:g} GiB is full of starred videos:"
                " unstar or delete some"
            )

    def find(self, job_id: Any) -> Job:
        """The job, unless it is in the trash.

        Raises:
            NotFound: there is none.
            RequestError: this cannot be an id.
        """
        job = self.history.get(parse_job_id(job_id))
        if job is None or job.deleted_at is not None:
            raise NotFound(f"job_id: no job has the id {job_id}")
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
        deleted: bool = False,
    ) -> dict[str, Any]:
        """A page of jobs, newest first: `jobs`, `total`, `page`, `page_size`.

        `query` asks for jobs whose prompt has all of its words, the last one as a prefix.

        Raises:
            RequestError: naming the field that is not acceptable.
        """
        statuses: frozenset[JobStatus] | None = None
        if status is not None and status != "":
            if status not in list(JobStatus):
                raise refuse("status", status, "one of " + ", ".join(JobStatus))
            statuses = frozenset({JobStatus(status)})
        found = self.history.list(
            JobQuery(
                status=statuses,
                text=text("query", "" if query is None else query, least=0, most=MAX_QUERY_CHARS),
                starred=starred,
                kind=kind,
                deleted=deleted,
                page=whole("page", page, least=1, most=10**9),
                page_size=whole("page_size", page_size, least=1, most=MAX_PAGE_SIZE),
            )
        )
        return {
            "jobs": [self.view(job) for job in found.jobs],
            "total": found.total,
            "page": found.page,
            "page_size": found.page_size,
        }

    async def cancel(self, job_id: Any) -> Job:
        """Stop a job, waiting or running; one that has ended is returned as it is.

        Raises as `find`.
        """
        job = self.find(job_id)
        if job.status.terminal:
            return job
        if job.id in self._claimed:
            live = self._live[job.id]
            live.cancel_requested = True
            if live.slot is not None:
                self.pool.slots[live.slot].slot.cancel(job.id)
            self.changed.beat()
            return job
        self._withdrawn.add(job.id)  # so that it is not claimed while this is written
        try:
            job = await self.history.update(job.id, withdrawn)
        finally:
            self._withdrawn.discard(job.id)
        self._queue_moved()
        return job

    async def star(self, job_id: Any, starred: Any = True) -> Job:
        """Keep a video from being evicted, or not any more. Raises as `find`."""
        if not isinstance(starred, bool):
            raise refuse("starred", starred, "true or false")
        self.find(job_id)
        job = await self.history.update(job_id, lambda job: replace(job, starred=starred))
        self.changed.beat()
        return job

    # Trash

    async def delete(self, job_id: Any) -> Job:
        """Put an ended job into the trash: nobody sees it or its files from now on.

        Raises:
            Conflict: it has not ended. Otherwise as `find`.
        """
        job = self.find(job_id)
        if not job.status.terminal:
            raise Conflict(f"job {job.id} is {job.status}: cancel it before deleting it")
        async with self._files:
            job = await self.history.update(
                job.id, lambda job: replace(job, deleted_at=job.deleted_at or time.time())
            )
            await asyncio.to_thread(self.media.withhold, job.id)
        self.changed.beat()
        return job

    async def restore(self, job_id: Any) -> Job:
        """Undo a delete.

        Raises:
            NotFound: the trash has no such job (any more).
        """
        async with self._files:
            job = self.history.get(parse_job_id(job_id))
            if job is None or job.deleted_at is None:
                raise NotFound(f"job_id: the trash has no such job: {job_id}")
            await asyncio.to_thread(self.media.unwithhold, job.id)
            job = await self.history.update(job.id, lambda job: replace(job, deleted_at=None))
        self.changed.beat()
        return job

    async def empty_trash(self, older_than_hours: float = 0.0) -> int:
        """Remove deleted jobs for good, files first; returns how many."""
        limit = time.time() - older_than_hours * 3600
        purged = 0
        for job in self.history.trashed():
            async with self._files:
                purged += await self._purge(job.id, limit)
        return purged

    async def _purge(self, job_id: str, limit: float) -> bool:
        """Remove a job deleted before `limit`, unless it was restored or purged meanwhile."""
        job = self.history.get(job_id)
        if job is None or job.deleted_at is None or job.deleted_at > limit:
            return False
        await asyncio.to_thread(self.media.remove, job.id)
        await self.history.remove(job.id)
        self._live.pop(job.id, None)
        self.changed.beat()
        return True

    # Quota

    @property
    def quota_bytes(self) -> int:
        """Room for videos."""
        return int(self.settings.quota_gib * 2**30)

    async def _enforce_quota(self) -> None:
        """Make room: the trash goes first, then the oldest unstarred videos, not their records."""
        while self.media.total_bytes() > self.quota_bytes:
            async with self._files:
                if not await self._remove_next():
                    return

    async def _remove_next(self) -> bool:
        """Remove what the quota can best do without; False when there is nothing."""
        trashed = min(self.history.trashed(), key=lambda job: job.deleted_at or 0, default=None)
        if trashed is not None:
            return await self._purge(trashed.id, time.time())
        for job in self.history.evictable(1):
            log.info("job %s: video evicted, the quota is full", job.id)
            job = await self.history.update(job.id, evicted)
            if job.evicted_at is not None:
                await asyncio.to_thread(self.media.remove_video, job.id)
            self.changed.beat()
            return True
        return False

    # Turns

    @property
    def waiting(self) -> list[Job]:
        """Jobs that wait for a slot, oldest first."""
        taken = self._claimed | self._withdrawn
        return [job for job in self.history.with_status(JobStatus.PENDING) if job.id not in taken]

    @property
    def tickets_needed(self) -> int:
        """How many tickets should be queued or granted now: one for each run that a ticket sees
        to its end, and for the waiting jobs as many as bring it to one more than the slots."""
        if self.stopping:
            return 0
        return min(len(self.waiting) + self._turns, len(self.pool.slots) + 1)

    async def engine_turn(self) -> str | None:
        """A granted ticket: wait for a ready slot and a runnable job, and see the run to its end.

        Returns the job's id, None when nothing was left to run. Cancelling the turn does not touch
        the run.
        """
        count = self.changed.count
        while (pair := self._claim()) is None:
            if self.stopping or not self.waiting:
                return None
            count = await self.changed.after(count)
        slot, job = pair
        run = self.pool.run(slot, lambda slot: self._execute(slot, job))
        self._turns += 1
        try:
            await asyncio.shield(run)
        finally:
            self._turns -= 1
        return job.id

    def _claim(self) -> tuple[SupervisedSlot, Job] | None:
        """Choose and claim in one breath: no await in here."""
        slot = self.pool.ready_slot()
        if slot is None or self.stopping:
            return None
        job = scheduling.next_job(self.waiting, self.speeds.run_seconds)
        if job is None:
            return None
        self._claimed.add(job.id)
        self._live[job.id] = Live(stage="starting", stage_began=time.monotonic())
        self._queue_moves += 1
        return slot, job

    async def _execute(self, slot: Slot, job: Job) -> bool:
        """Run a claimed job on a leased slot; True when the slot did its work."""
        live = self._live[job.id]
        try:
            job = await self.history.update(
                job.id,
                lambda job: job.moved(
                    JobStatus.PROCESSING,
                    started_processing_at=time.time(),
                    attempts=job.attempts + 1,
                    model=self.settings.model_name,
                    slot=slot.index,
                    error=None,
                ),
            )
            self.changed.beat()
            good = await self._attempt(slot, job, live)
            if live.cancel_requested:  # and the job was requeued, its slot having died
                await self.history.update(job.id, withdrawn)
            return good
        except HistoryError as error:
            log.error("job %s: its record could not be written: %s", job.id, error)
            await asyncio.sleep(STORE_PAUSE_SECONDS)
            return True
        finally:
            live.ended_at = time.monotonic()
            live.image = None
            self._claimed.discard(job.id)
            self._queue_moved()

    async def _attempt(self, slot: Slot, job: Job, live: Live) -> bool:
        try:
            if live.cancel_requested:
                raise JobCancelled
            live.slot = slot.index
            done = await slot.run(self._request(job), lambda event: self._hear(live, event))
            video, poster = await asyncio.to_thread(
                self.media.finalise, job.id, slot.index, done.video, done.poster
            )
        except JobCancelled:
            await self.history.update(job.id, cancelled)
            return True
        except JobFailed as error:
            await self._fail(job, str(error))
            return True
        except SlotDied as error:
            await self._interrupted(job, str(error))
            return False
        except (OSError, MediaError) as error:
            log.exception("job %s: its video could not be kept", job.id)
            await self._fail(job, f"the video could not be kept: {reason_of(error)}")
            return True
        job = await self.history.update(
            job.id,
            lambda job: job.moved(
                JobStatus.COMPLETED,
                completed_processing_at=time.time(),
                seconds=done.seconds,
                hashes={"frames": done.frames_hash, "latents": done.latents_hash},
                video=video,
                poster=poster,
            ),
        )
        self.speeds.observe(job)
        if self.media.total_bytes() > self.quota_bytes:
            self._housework.set()
        return True

    async def _fail(self, job: Job, error: str) -> None:
        log.warning("job %s failed: %s", job.id, error)
        await self.history.update(
            job.id,
            lambda job: job.moved(
                JobStatus.FAILED, completed_processing_at=time.time(), error=error
            ),
        )

    async def _interrupted(self, job: Job, reason: str) -> None:
        """The slot is gone: once more from the queue, unless that was tried already."""
        if self.stopping:
            await self.history.update(job.id, interrupted)
        elif job.attempts < MAX_ATTEMPTS:
            log.warning("job %s: %s; queued again", job.id, reason)
            await self.history.update(
                job.id, lambda job: job.moved(JobStatus.PENDING, error=reason)
            )
        else:
            await self._fail(job, f"the engine died {job.attempts} times on it, last: {reason}")

    def _request(self, job: Job) -> messages.Run:
        facts: dict[str, Any] = {
            "job_id": job.id,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
            "height": job.height,
            "width": job.width,
            "num_frames": job.num_frames,
            "fps": job.fps,
            "schedule": job.schedule,
            "lora": job.lora,
            "lora_scale": job.lora_scale,
        }
        more = {
            "kind": job.kind,
            "parent_id": job.parent_id,
            "model": job.model,
            "version": __version__,
        }
        return messages.Run(**facts, metadata=facts | more)

    def _hear(self, live: Live, event: messages.JobEvent) -> None:
        match event:
            case messages.Stage():
                live.stage, live.stage_began = event.stage, time.monotonic()
            case messages.Step():
                live.step = event.step
                live.step_seconds = event.seconds
            case messages.Tiles():
                live.tiles = event.done, event.total
            case messages.Latent():
                live.image = event.image
        self.changed.beat()

    # Views

    def view(self, job: Job) -> dict[str, Any]:
        """The job as every door shows it: its record, its live state, where its files are."""
        live = self._live.get(job.id) if job.id in self._claimed else None
        place = self._place(job)
        there = job.status is JobStatus.COMPLETED and job.deleted_at is None
        done = job.status is JobStatus.COMPLETED
        return job.to_record() | {
            "enhanced": job.enhanced,
            "steps": job.num_inference_steps,
            "step": job.num_inference_steps if done else live.step if live else 0,
            "stage": live.stage if live else "",
            "tile": live.tiles[0] if live else 0,
            "tiles": live.tiles[1] if live else 0,
            "cancel_requested": bool(live and live.cancel_requested),
            "position": place.position if place else None,
            "eta_seconds": self._eta(job, live, place),
            "video_url": f"/files/{job.id}" if there and job.evicted_at is None else None,
            "poster_url": f"/files/{job.id}/poster" if there and job.poster else None,
        }

    def image(self, job_id: str) -> str | None:
        """The newest live picture of a running job, a data URL."""
        live = self._live.get(job_id)
        return live.image if live else None

    def _place(self, job: Job) -> scheduling.Place | None:
        if job.status is not JobStatus.PENDING:
            return None
        return self._all_places().get(job.id)

    def _all_places(self) -> dict[str, scheduling.Place]:
        """Places of all waiting jobs; computed when one comes or goes, and each half second."""
        key = (self._queue_moves, int(time.monotonic() * 2))
        if key != self._places_key:
            self._places = scheduling.places(
                self.waiting, self._busy_seconds(), self.speeds.run_seconds
            )
            self._places_key = key
        return self._places

    def _busy_seconds(self) -> list[float | None]:
        seconds: list[float | None] = []
        for supervised in self.pool.slots:
            job_id = supervised.slot.job_id
            job = self.history.get(job_id) if job_id else None
            if job is not None:
                seconds.append(self._eta(job, self._live.get(job.id), None))
            elif supervised.ready:
                seconds.append(0.0)
        return seconds

    def _eta(self, job: Job, live: Live | None, place: scheduling.Place | None) -> float | None:
        """Seconds until the job's video is there; None when that is not known."""
        if place is not None:
            return place.eta_seconds and round(place.eta_seconds, 1)
        if live is None or job.status is not JobStatus.PROCESSING:
            return None
        left = self.speeds.run_seconds(job, live.step)
        if left is None and live.step_seconds is not None:
            left = (job.num_inference_steps - live.step) * live.step_seconds
        if left is None:
            return None
        # Stages after the last step report no progress of their own: count their time down.
        idle = time.monotonic() - live.stage_began if live.step == job.num_inference_steps else 0
        return round(max(0.0, left - idle), 1)

    async def watch(self, job_id: Any, interval: float = 0.5) -> AsyncIterator[dict[str, Any]]:
        """The job's view whenever it changes, to its end: a new status at once, its steps at most
        every `interval` seconds.

        Raises as `find`, also when the job is deleted meanwhile.
        """
        last: dict[str, Any] | None = None
        next_at = 0.0
        while True:
            count = self.changed.count
            job = self.find(job_id)
            pause = next_at - time.monotonic()
            moved = last is None or job.status != last["status"]
            if moved or self.stopping or pause <= 0:
                if (view := self.view(job)) != last:
                    yield view
                    last, next_at = view, time.monotonic() + interval
                if job.status.terminal or self.stopping:
                    return
                await self.changed.after(count)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.after(count), pause)

    def snapshot(self, limit: int) -> dict[str, Any]:
        """What a page shows live: slots, counts, and views of at most `limit` jobs: the running
        ones, those that just ended, and the oldest that wait."""
        recent = [self.history.get(job_id) for job_id in self._live]
        shown = {job.id: job for job in recent if job is not None and job.deleted_at is None}
        for job in self.history.with_status(JobStatus.PENDING)[: max(0, limit - len(shown))]:
            shown[job.id] = job
        return {
            "slots": [slot.describe() for slot in self.pool.slots],
            "pending": self.history.count(JobStatus.PENDING),
            "processing": self.history.count(JobStatus.PROCESSING),
            "jobs": [self.view(job) | {"image": self.image(job.id)} for job in shown.values()],
        }

    def health(self) -> dict[str, Any]:
        """Whether a video could be made now, and if not, why."""
        reasons = []
        if self.stopping:
            reasons.append("the server is stopping")
        if not self.pool.ready_or_busy:
            reasons.append("no slot is ready")
        slots = [slot.describe() for slot in self.pool.slots]
        return {"ok": not reasons, "reasons": reasons, "slots": slots}


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its path."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def cancelled(job: Job) -> Job:
    """The move to CANCELLED."""
    return job.moved(JobStatus.CANCELLED, completed_processing_at=time.time())


def evicted(job: Job) -> Job:
    """Without its video from now on, unless it was starred or deleted meanwhile."""
    kept = job.starred or job.deleted_at is not None
    return job if kept else replace(job, evicted_at=time.time())


def withdrawn(job: Job) -> Job:
    """CANCELLED, unless the job has ended meanwhile."""
    return job if job.status.terminal else cancelled(job)


def interrupted(job: Job) -> Job:
    """Back to the queue through no fault of the job: the attempt does not count."""
    return job.moved(
        JobStatus.PENDING,
        attempts=max(0, job.attempts - 1),
        slot=None,
    )
