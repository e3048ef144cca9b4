"""The one orchestrator: submit, enhance, cancel, delete, and a granted ticket's turn at a slot.

Everything that a door (page, API, HTTP) can do is a method here. The history is the truth about
jobs, the pool about slots; the studio keeps only what is alive now: which jobs are claimed, at
which step they are, how fast this machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from mochi_app.callers import ANONYMOUS, HOUSE, Caller
from mochi_app.changes import Pulse
from mochi_app.disk_errors import reason_of
from mochi_app.errors import HistoryError, without_folders
from mochi_app.jobs import (
    REQUEST_FIELDS,
    Job,
    JobIds,
    JobStatus,
    parse_job_id,
    to_be_cancelled,
    withdrawn,
)
from mochi_app.logs import about
from mochi_app.loras import lora_names
from mochi_app.model_defaults import ModelDefaults
from mochi_app.request import (
    Conflict,
    GenerationRequest,
    NotFound,
    NotYours,
    RequestError,
    refuse,
    text,
    walkable,
    whole,
)
from mochi_app.settings import Settings
from mochi_app.slots.pool import Pool, SupervisedSlot
from mochi_app.store.backups import Backups
from mochi_app.store.history import History
from mochi_app.store.job_index import JobQuery
from mochi_app.store.media import MediaStore
from mochi_app.store.outputs import Outputs
from mochi_app.studio import scheduling
from mochi_app.studio.disk_space import Room, video_bytes
from mochi_app.studio.live import LiveJobs, is_news
from mochi_app.studio.metrics import Metrics
from mochi_app.studio.recovery import Mender
from mochi_app.studio.retention import Shelf
from mochi_app.studio.runs import Runs
from mochi_app.studio.suspects import released

log = logging.getLogger(__name__)

Params = ParamSpec("Params")
Result = TypeVar("Result")

MAX_PAGE_SIZE = 100
MAX_QUERY_CHARS = 200
JANITOR_SECONDS = 60.0
JANITOR_RETRY_SECONDS = 5.0  # after a failure, of a full disk for one
ETA_PAUSE = 5.0  # seconds between two views for which only the time has passed
ROOM_SECONDS = 2.0  # between looks at a disk that is too full for the next job
SPEED_SAMPLE = 20  # finished jobs that teach the speeds at start
# What an enhance takes over from its preview.
INHERITED = (
    "batch_id", "prompt", "negative_prompt", "seed", "guidance_scale", "height", "width",
    "num_frames", "fps", "schedule", "lora", "lora_scale", "options",
)  # fmt: skip


def to_the_end(
    method: Callable[Params, Coroutine[Any, Any, Result]],
) -> Callable[Params, Coroutine[Any, Any, Result]]:
    """What was begun is done whole, its caller there or not: Gradio cancels a call, wherever it
    stands, when its caller asks for that."""

    @functools.wraps(method)
    async def whole(*arguments: Params.args, **options: Params.kwargs) -> Result:
        return await asyncio.shield(method(*arguments, **options))

    return whole


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
        self.backups = Backups(
            settings.data_dir, hours=settings.backup_hours, kept=settings.backups_kept
        )
        self.live = LiveJobs(
            history, pool, lambda: self.waiting, lacks=self._lack, has_video=media.has_video
        )
        self.shelf = Shelf(history, media, self.changed, int(settings.quota_gib * 2**30))
        self.metrics = Metrics(history, media, self.shelf, pool)
        self.room = Room(media)
        self.outputs = Outputs(media, history, self.changed, len(pool.slots))
        self.checks: list[Callable[[], str | None]] = []  # other parts' reasons in `health`
        self._ids = JobIds(last=history.last_id)
        self._withdrawn: Counter[str] = Counter()  # by job id: cancels that are being written
        self._janitor: asyncio.Task[None] | None = None
        self._housework = asyncio.Event()  # set when the janitor should not wait for its hour
        self._mender = Mender(history, media, self.changed, self.live.claimed)
        self._runs = Runs(
            settings, defaults, history, media,
            live=self.live, shelf=self.shelf, outputs=self.outputs, metrics=self.metrics,
            changed=self.changed, stopping=lambda: self.stopping, on_unwritten=self._housework.set,
        )  # fmt: skip
        self._enhancing = asyncio.Lock()
        self._accepting: list[Job] = []  # between the look at the backlog and their record
        self._turns = 0  # tickets that see a run to its end
        pool.on_change = self.changed.beat

    # Start and stop

    async def start(self) -> None:
        """Take over what an earlier process left, then bring up the slots."""
        await self._mender.take_over()
        self.live.waits.begin(self.history.with_status(JobStatus.PENDING), time.time())
        self._learn_speeds()
        self._janitor = asyncio.create_task(self._keep_house(), name="janitor")
        self.outputs.start()
        self.backups.start()
        self.pool.start()

    def begin_stop(self) -> None:
        """Refuse new jobs and wake everybody who waits, so that streams can end."""
        self.stopping = True
        self.history.begin_end()
        self.changed.beat()

    async def stop(self) -> None:
        """End the slots; what still runs goes back to PENDING."""
        self.begin_stop()
        if self._janitor is not None:
            self._janitor.cancel()
            await asyncio.gather(self._janitor, return_exceptions=True)
        await self.backups.stop()
        await self.pool.stop(self.settings.drain_seconds)
        await self.outputs.stop()

    def _learn_speeds(self) -> None:
        query = JobQuery(status=frozenset({JobStatus.COMPLETED}), page_size=SPEED_SAMPLE)
        for job in reversed(self.history.list(query).jobs):
            if job.model == self.settings.model_name:
                self.live.speeds.observe(job)

    async def _keep_house(self) -> None:
        while True:
            self.live.forget_ended()
            try:
                await self.room.look()
                await self._mender.mend()
                await self.shelf.empty_trash(older_than_hours=self.settings.trash_hours)
                await self.shelf.enforce_quota()
            except (HistoryError, OSError) as error:  # told by the history, or by the outputs
                log.warning("no housekeeping now: %s", error)
                await asyncio.sleep(JANITOR_RETRY_SECONDS)
                self._housework.set()
            except Exception:
                log.exception("housekeeping failed; it is tried again")
                await asyncio.sleep(JANITOR_RETRY_SECONDS)
                self._housework.set()
            # Not `wait_for`, which loses a cancel that comes with what it waits for (Python 3.11)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(JANITOR_SECONDS):
                    await self._housework.wait()
            self._housework.clear()

    # What people ask for

    @to_the_end
    async def submit(self, *, owner: str = "", **parameters: Any) -> Job:
        """Accept a request as a PENDING job, durable before this returns.

        `parameters` are those of `GenerationRequest.validate`.

        Raises:
            RequestError: a value is not acceptable, or there is no room for another job.
        """
        loras = []
        if parameters.get("lora"):  # a look at the disk, which may be a slow share
            loras = await asyncio.to_thread(lora_names, self.settings.lora_dir)
            loras += self._lora_of_request(owner, parameters.get("request_id"))
        request = GenerationRequest.validate(
            self.defaults,
            preview_steps=self.settings.preview_steps,
            loras=loras,
            **parameters,
        )
        drawn = frozenset({"seed"} if parameters.get("seed") is None else ())
        job = Job.from_request(request, id=self._ids.draw(), kind="preview", owner=owner)
        return await self._accept(job, drawn)

    def _lora_of_request(self, owner: str, request_id: Any) -> list[str]:
        """What an earlier request of that id asked for: asked again it is answered, its LoRA file
        there or not."""
        known = isinstance(request_id, str) and self.history.find_request(owner, request_id.strip())
        return [known.lora] if known and known.lora else []

    @to_the_end
    async def enhance(self, job_id: Any, *, owner: str = "") -> Job:
        """A new job with the same prompt, seed and size as a finished preview, and more steps.

        Asked twice for one preview, it answers with the enhance that exists, or will exist.

        Raises:
            RequestError: unknown job, not a finished preview, or no room.
        """
        async with self._enhancing:
            return await self._enhance(self.find(job_id), owner)

    async def _enhance(self, parent: Job, owner: str) -> Job:
        if parent.enhanced:
            raise Conflict(f"job {parent.id} is an enhance: only a preview can be enhanced")
        if parent.status is not JobStatus.COMPLETED:
            held = f" and held: {parent.held}" if parent.held else ""
            raise Conflict(
                f"job {parent.id} is {parent.status}{held}: expected a COMPLETED preview"
            )
        if parent.model != self.settings.model_name:
            raise Conflict(
                f"job {parent.id} was made by {parent.model}, this server runs"
                f" {self.settings.model_name}: the same seed would give another video"
            )
        steps = self.settings.enhance_steps
        walkable(parent.schedule, steps)
        for child in self.history.children(parent.id):
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
            return job.status is JobStatus.COMPLETED and self.media.has_video(job.id)
        return not self.live.cancelling(job)

    async def _accept(self, job: Job, drawn: frozenset[str]) -> Job:
        known = job.request_id and self.history.find_request(job.owner, job.request_id)
        self._accepting.append(job)
        try:
            if not known:
                await self._require_room(job)
            record = replace(job.moved(JobStatus.PENDING), model=self.settings.model_name)
            accepted = await self.history.add(record, drawn=drawn)
        finally:
            self._accepting.remove(job)
        self.live.waits.since(accepted)
        self._queue_moved()
        return accepted

    def _queue_moved(self) -> None:
        self.live.queue_moved()
        self.changed.beat()

    async def _require_room(self, job: Job) -> None:
        if self.stopping:
            raise RequestError("the server is stopping: ask again in a moment")
        waiting = self.history.count(JobStatus.PENDING) - self.history.held()
        coming = sum(self.history.get(one.id) is None for one in self._accepting)
        if waiting + coming > self.settings.max_pending:
            raise RequestError(
                f"{waiting} jobs are waiting, the most this server takes: ask again later"
            )
        await self.history.check()
        while (lack := await self._look(job)) is not None:
            if not await self.shelf.purge_next():
                raise RequestError(f"{lack}: delete videos or free the disk")
        promised = sum(video_bytes(one) for one in self._accepted())
        if not self.shelf.can_make_room(promised):
            raise RequestError(
                f"the quota of {self.settings.quota_gib:g} GiB is full of starred videos and of"
                " jobs that wait: unstar or delete some"
            )

    def _accepted(self) -> list[Job]:
        """All jobs whose video has yet to be written, also those that are just being accepted. A
        held one is promised no room: tried again, it waits for some like any other."""
        open_jobs = self.history.with_status(JobStatus.PENDING, JobStatus.PROCESSING)
        jobs = [job for job in open_jobs if job.held is None]
        known = {job.id for job in jobs}
        return jobs + [job for job in self._accepting if job.id not in known]

    async def _look(self, job: Job) -> str | None:
        """Measure the disk; why a new job does not fit beside all that were accepted."""
        try:
            await self.room.look()
        except OSError as error:
            raise RequestError(f"the disk does not tell its room: {reason_of(error)}") from error
        return self.room.lack(job, (one for one in self._accepted() if one.id != job.id))

    def _lack(self, job: Job) -> str | None:
        """Why the disk does not let a waiting job start beside those that run."""
        return self._unusable or self._short_for(job)

    @property
    def _unusable(self) -> str | None:
        """Why no video could be kept, whatever room there is."""
        problem = self.history.problem or self.outputs.problem
        return problem and without_folders(problem)

    def _short_for(self, job: Job) -> str | None:
        """Why the disk has no room for a waiting job beside those that run."""
        return self.room.lack(job, self._running)

    def find(self, job_id: Any) -> Job:
        """The job, unless it is in the trash.

        Raises:
            NotFound: there is none, or it is in the trash, as the message then says: to anybody,
                as everybody can look into the trash.
            RequestError: this cannot be an id.
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
                held=held,
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

    @to_the_end
    async def cancel(self, job_id: Any, *, by: Caller = HOUSE) -> Job:
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
            try:  # what is left to do after a crash of the server; now it is being done
                return await self.history.update(job.id, to_be_cancelled)
            except HistoryError as error:
                log.warning("job %s: its cancel is not written down: %s", job.id, error)
                return job
        self._withdrawn[job.id] += 1  # so that it is not claimed while this is written
        try:
            job = await self.history.update(job.id, withdrawn)
        finally:
            self._withdrawn -= Counter([job.id])
        self._queue_moved()
        await self._runs.drop_checkpoint(job.id)
        return job

    async def retry(self, job_id: Any, *, by: Caller = HOUSE) -> Job:
        """Try a job once more: a held one itself, with nothing that counts against it any more; in
        place of one that failed or was cancelled, a new one of the caller's.

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
        """Keep a video from being evicted, or not any more. Raises as `find`."""
        if not isinstance(starred, bool):
            raise refuse("starred", starred, "true or false")
        self.find(job_id)
        job = await self.history.update(job_id, lambda job: replace(job, starred=starred))
        self.changed.beat()
        return job

    @to_the_end
    async def delete(self, job_id: Any, *, by: Caller = HOUSE) -> Job:
        """Put an ended job into the trash: nobody sees it or its files from now on.

        Raises:
            Conflict: it has not ended.
            NotYours: it is another caller's. Otherwise as `find`.
        """
        job = self.find(job_id)
        require_own(job, by, "delete")
        return await self.shelf.delete(job)

    @to_the_end
    async def restore(self, job_id: Any, *, by: Caller = HOUSE) -> Job:
        """Undo a delete; a job that is not in the trash is returned as it is.

        Raises:
            NotFound: the trash has no such job (any more).
            NotYours: it is another caller's.
        """
        job = self.history.get(parse_job_id(job_id))
        if job is not None and job.deleted_at is not None:
            require_own(job, by, "restore")
        return await self.shelf.restore(job_id)

    @to_the_end
    async def empty_trash(self, *, by: Caller = HOUSE) -> int:
        """Remove the deleted jobs for good; returns how many.

        Raises:
            NotYours: there is a login, and the caller is no admin.
        """
        if not by.may_empty_trash:
            raise NotYours("the trash is everybody's: only an admin can empty it")
        return await self.shelf.empty_trash()

    def view(self, job: Job) -> dict[str, Any]:
        """The job as every door shows it."""
        return self.live.view(job)

    # Turns

    @property
    def waiting(self) -> list[Job]:
        """Jobs that wait for a slot, oldest first. A held one does not: it waits for a person."""
        taken = self.live.claimed | self._withdrawn.keys()
        pending = self.history.with_status(JobStatus.PENDING)
        able = (job for job in pending if job.held is None and not job.cancel_requested)
        return [job for job in able if job.id not in taken]

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
        while (pair := await self._next_pair()) is None:
            if self.stopping or not self.waiting:
                return None
            # Room comes without a word: from outside, or by a video that was smaller than feared.
            pause = ROOM_SECONDS if self.waits_for_room else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    count = await self.changed.after(count)
        slot, job = pair
        with about(slot=slot.slot.index, job=job.id):
            run = self.pool.run(slot, lambda slot: self._runs.execute(slot, job))
        self._turns += 1
        try:
            await asyncio.shield(run)
        finally:
            self._turns -= 1
        return job.id

    @property
    def starving(self) -> bool:
        """Whether a slot is ready for a job that waits, and no turn brings them together."""
        ready = self.pool.ready_slot() is not None and not self.stopping
        return ready and self._next_job() is not None

    @property
    def waits_for_room(self) -> str | None:
        """Why no waiting job can start, though a slot may be ready: the disk."""
        reason = None
        for job in self.waiting:
            if (lack := self._lack(job)) is None:
                return None
            reason = reason or lack
        return reason

    @property
    def _short_of_room(self) -> str | None:
        """Why the disk would not take a video now, of a job that waits or of the usual size."""
        if self.waiting:
            return self.waits_for_room
        usual = self.defaults.height * self.defaults.width * self.defaults.num_frames
        return self.room.lack_for(usual)

    async def _next_pair(self) -> tuple[SupervisedSlot, Job] | None:
        if self.pool.ready_slot() is None or not self.waiting or self._unusable:
            return None
        before = self.waits_for_room
        while True:
            try:
                await self.room.look()
            except OSError as error:
                self.outputs.met(reason_of(error))
                return None
            pair = self._claim()
            short = None if pair else self.waits_for_room
            if not short or self._unusable or not await self.shelf.purge_next():
                break
        if short and not before:
            log.error("no job is started: %s", short)
            self.changed.beat()
        return pair

    def _claim(self) -> tuple[SupervisedSlot, Job] | None:
        """Choose and claim in one breath: no await in here."""
        slot = self.pool.ready_slot()
        if slot is None or self.stopping:
            return None
        job = self._next_job()
        if job is None:
            return None
        self.live.claim(job.id)
        return slot, job

    def _next_job(self) -> Job | None:
        """The job to start now beside those that run, a ready slot provided."""
        fitting = [job for job in self.waiting if self._lack(job) is None]
        estimate, since = self.live.speeds.run_seconds, self.live.waits.since
        return scheduling.next_job(fitting, estimate, self._running, since)

    @property
    def _running(self) -> list[Job]:
        """The claimed jobs."""
        found = (self.history.get(job_id) for job_id in self.live.claimed)
        return [job for job in found if job is not None]

    async def watch(self, job_id: Any, interval: float = 0.5) -> AsyncIterator[dict[str, Any]]:
        """The job's view whenever it changes, to its end: a new status at once, its steps at most
        every `interval` seconds; what only counts down (an ETA) every `ETA_PAUSE`.

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
                view, now = self.view(job), time.monotonic()
                age = now - next_at + interval  # of `last`
                if last is None or is_news(last, view, age) or (view != last and age >= ETA_PAUSE):
                    yield view
                    last, next_at = view, now + interval
                if job.status.terminal or self.stopping:
                    return
                await self.changed.after(count)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.changed.after(count)

    def health(self) -> dict[str, Any]:
        """Whether a video could be made now, and if not, why."""
        reasons = []
        if self.stopping:
            reasons.append("the server is stopping")
        if not self.pool.ready_or_busy:
            reasons.append("no slot is ready")
        problems = (self.history.problem, self.outputs.problem)
        reasons += [without_folders(problem) for problem in problems if problem is not None]
        warnings = [self.backups.problem] if self.backups.problem is not None else []
        warnings += self.outputs.warnings
        if not self.shelf.can_make_room(0):
            reasons.append("the quota is full of starred videos")
        reasons += filter(None, [self._short_of_room, *(check() for check in self.checks)])
        slots = [slot.describe() for slot in self.pool.slots]
        reasons = list(dict.fromkeys(reasons))
        return {"ok": not reasons, "reasons": reasons, "warnings": warnings, "slots": slots}


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
