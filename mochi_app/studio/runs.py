"""One run of one job on a slot, and the record of how it ended.

A run always ends with the truth in the history: the video that it made, the reason why there is
none, or the job back in the queue. Which job runs where and when is decided elsewhere
(`studio/dispatch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from mochi_app import __version__, messages
from mochi_app.changes import Changes
from mochi_app.disk_errors import full, reason_of
from mochi_app.errors import HistoryError, MediaError, without_folders
from mochi_app.jobs import Job, JobStatus, cancelled, interrupted, withdrawn
from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameters import PARAMETERS
from mochi_app.setting_types import Timeouts
from mochi_app.settings import Settings
from mochi_app.slots.job_run import JobCancelled, JobFailed
from mochi_app.slots.slot import Slot, SlotDied, SlotState
from mochi_app.store.history import History
from mochi_app.store.media import MediaGone, MediaStore
from mochi_app.store.outputs import Outputs
from mochi_app.studio import scheduling
from mochi_app.studio.filing import Filing, Unfiled
from mochi_app.studio.live import Live, LiveJobs
from mochi_app.studio.metrics import Metrics
from mochi_app.studio.retention import Retention
from mochi_app.studio.suspects import advanced, cleared

log = logging.getLogger(__name__)

POISON_DEATHS = 2  # slots that die of a job with no checkpoint in between
MAX_ATTEMPTS = 20  # whatever it achieved in each
MAX_REASON_CHARS = 300
STORE_PAUSE_SECONDS = 1.0  # so that a store that refuses writes is not tried in a tight loop


class Runs:
    """Runs jobs that were claimed, on slots that were leased for them.

    `stopping` says whether the server is; `on_unwritten` is called when a run could not be written
    down and its record is to be mended.
    """

    def __init__(
        self,
        settings: Settings,
        defaults: ModelDefaults,
        history: History,
        media: MediaStore,
        *,
        live: LiveJobs,
        retention: Retention,
        outputs: Outputs,
        metrics: Metrics,
        changed: Changes,
        stopping: Callable[[], bool],
        on_unwritten: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._defaults = defaults
        self._history = history
        self._media = media
        self._live = live
        self._retention = retention
        self._outputs = outputs
        self._filing = Filing(
            history, media, outputs, free_space=self._free_space, stopping=stopping
        )
        self._metrics = metrics
        self._changed = changed
        self._stopping = stopping
        self._on_unwritten = on_unwritten

    async def execute(self, slot: Slot, job: Job) -> bool:
        """Run a claimed job on a leased slot; True when the slot did its work."""
        live = self._live.jobs[job.id]
        try:
            job = await self._history.update(
                job.id,
                lambda job: job.moved(
                    JobStatus.PROCESSING,
                    started_processing_at=time.time(),
                    attempts=job.attempts + 1,
                    model=self._settings.model_name,
                    slot=slot.index,
                    error=None,
                ),
            )
            live.began = time.monotonic()
            self._metrics.started(job, self._live.waits.seconds(job))
            log.info("started: attempt %d, %d steps", job.attempts, job.num_inference_steps)
            self._changed.beat()
            return await self._attempt(slot, job, live)
        except HistoryError as error:
            log.error("job %s: its record could not be written: %s", job.id, error)
            await asyncio.sleep(STORE_PAUSE_SECONDS)
            self._on_unwritten()
            return True
        finally:
            if live.cancel_requested:  # its slot died, or it never began
                with contextlib.suppress(HistoryError):
                    await self._record(job.id, withdrawn)
            self._live.release(job.id)
            self._changed.beat()
            await self.drop_checkpoint(job.id)

    async def _attempt(self, slot: Slot, job: Job, live: Live) -> bool:
        try:
            done, video, poster = await self._make(slot, job, live)
        except JobCancelled:
            await self._record(job.id, cancelled)
            return True
        except JobFailed as error:
            if error.disk_full:
                await self._disk_full(job, str(error))
            elif error.unwritten:
                self._outputs.met(str(error))
                await self._unkept(job, "its video could not be written", str(error))
            else:
                await self._fail(job, str(error))
            return not slot.dying
        except SlotDied as error:
            live.blameless = live.blameless or slot.blameless or self._stopping()
            await self._interrupted(job, live, str(error))
            return False
        except Unfiled as error:
            log.warning("job %s: its finished video is left to the next start: %s", job.id, error)
            return True
        except (OSError, MediaError) as error:
            log.exception("job %s: its video could not be kept", job.id)
            if full(error):
                await self._disk_full(job, reason_of(error))
            elif isinstance(error, MediaGone):
                await self._unkept(job, "its finished video is gone from the disk", str(error))
            else:
                await self._fail(job, f"the video could not be kept: {reason_of(error)}")
            return True
        job = await self._record(
            job.id,
            lambda job: job.moved(
                JobStatus.COMPLETED,
                completed_processing_at=time.time(),
                seconds=done.seconds,
                hashes={"frames": done.frames_hash, "latents": done.latents_hash},
                video=video,
                poster=poster,
                resumed_step=live.resumed_step,
            ),
        )
        self._live.speeds.observe(job)
        self._metrics.completed(job, time.monotonic() - live.began)
        log.info("completed in %.1f s", sum(done.seconds.values()))
        return True

    async def _record(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Write what became of a run, as soon as the store takes it: its work is done only once."""
        while True:
            try:
                return await self._history.update(job_id, change)
            except HistoryError:
                if self._stopping():  # the next start finds the video, or queues the job again
                    raise
            await asyncio.sleep(STORE_PAUSE_SECONDS)

    async def _make(self, slot: Slot, job: Job, live: Live) -> tuple[messages.Done, str, str]:
        """Run the job and put its files in place: what the rank says, names of video and poster.

        Whatever this raises, nothing of the run is left in the slot's scratch folder, but for what
        the next start is to file.
        """
        ended = True
        try:
            if live.cancel_requested:
                raise JobCancelled
            live.slot = slot.index
            # One that is dying by now dies of something older than this job
            live.blameless = slot.dying or slot.state is not SlotState.READY
            done = await slot.run(
                self._request(job), lambda event: self._hear(live, event), self._timeouts(job)
            )
            video, poster = await self._filing.file(job.id, slot.index, done, live)
            return done, video, poster
        except (Unfiled, asyncio.CancelledError):
            ended = False
            raise
        finally:
            if ended:
                await asyncio.to_thread(self._media.tidy, slot.index, job.id)

    async def _free_space(self, size: int) -> None:
        try:
            await self._retention.free_space(size)
        except (HistoryError, OSError) as error:  # the janitor tries again; the video comes first
            log.error("no room was made under the quota: %s", error)

    async def _fail(self, job: Job, error: str) -> None:
        log.warning("job %s failed: %s", job.id, error)
        await self._record(
            job.id,
            lambda job: job.moved(
                JobStatus.FAILED, completed_processing_at=time.time(), error=error
            ),
        )

    async def _disk_full(self, job: Job, error: str) -> None:
        """The disk filled up under a running job: once more, when it has room."""
        if job.attempts < MAX_ATTEMPTS:
            await self._unkept(job, "the disk filled up while its video was written", error)
        else:
            await self._fail(
                job, f"the disk was full {job.attempts} times: free it and ask again ({error})"
            )

    async def _unkept(self, job: Job, reason: str, error: str) -> None:
        """The disk did not keep the video of a running job: once more, when it can."""
        if job.attempts < MAX_ATTEMPTS:
            log.error("job %s: %s; queued again: %s", job.id, reason, error)
            await self._record(job.id, lambda job: job.moved(JobStatus.PENDING, error=reason))
        else:
            await self._fail(job, f"{reason}, {job.attempts} times ({error})")

    async def _interrupted(self, job: Job, live: Live, reason: str) -> None:
        """The slot is gone: once more from the queue, unless the job is poison to slots.

        It is when slots die of it and no checkpoint comes in between. What counts is in the record
        before the next attempt, so that the end of a server changes nothing.
        """
        if live.blameless:
            log.warning("job %s: %s; queued again, the attempt does not count", job.id, reason)
            await self._record(job.id, interrupted)
            return
        checkpoint_at = await asyncio.to_thread(self._media.checkpoint_time, job.id)
        if advanced(job, checkpoint_at):
            job = await self._record(job.id, cleared)
        reason = without_folders(reason)
        where = f"at step {live.step} of {job.num_inference_steps}: {reason}"
        deaths = [*job.deaths, where[:MAX_REASON_CHARS]]
        if len(deaths) >= POISON_DEATHS:
            times = f"{len(deaths)} slots died of it and it came no further"
            await self._fail(job, f"poison: {times}; " + "; ".join(deaths))
        elif job.attempts >= MAX_ATTEMPTS:
            await self._fail(job, f"the engine died {job.attempts} times on it, last {where}")
        else:
            log.warning("job %s: %s; queued again", job.id, where)
            died = {"deaths": deaths, "checkpoint_at": checkpoint_at}
            await self._record(
                job.id, lambda job: job.moved(JobStatus.PENDING, error=reason, **died)
            )

    async def drop_checkpoint(self, job_id: str) -> None:
        """Remove the checkpoint of a job that has ended."""
        job = self._history.get(job_id)
        if job is None or job.status.terminal:
            await asyncio.to_thread(self._media.remove_checkpoint, job_id)

    def _timeouts(self, job: Job) -> Timeouts:
        """How long the job's run may stand still on this machine."""
        usual = self._defaults.height * self._defaults.width * self._defaults.num_frames
        timeouts = self._settings.timeouts
        # What killed a slot may be a deadline that another, faster slot has taught.
        speeds = self._live.speeds if not job.deaths else scheduling.Speeds()
        chosen = scheduling.timeouts_for(job, speeds, timeouts, usual)
        if self._settings.compile:  # at the first video of a new size: minutes
            chosen = replace(chosen, step=max(chosen.step, timeouts.step))
        return chosen

    def _request(self, job: Job) -> messages.Run:
        asked = {name: getattr(job, name) for name in PARAMETERS}
        facts = {
            "job_id": job.id,
            "kind": job.kind,
            "parent_id": job.parent_id,
            "model": job.model,
            "version": __version__,
        }
        every = self._settings.checkpoint_steps
        return messages.Run(
            **asked,
            job_id=job.id,
            metadata=asked | facts,
            checkpoint=str(self._media.checkpoint(job.id)) if every else "",
            checkpoint_steps=every,
        )

    def _hear(self, live: Live, event: messages.JobEvent) -> None:
        match event:
            case messages.Stage():
                live.stage, live.stage_began = event.stage, time.monotonic()
            case messages.Resumed():
                live.step = live.resumed_step = event.step
            case messages.Step():
                live.step = event.step
                live.step_seconds = event.seconds
                self._metrics.stepped(event.seconds)
            case messages.Tiles():
                live.tiles = event.done, event.total
            case messages.Latent():
                live.image = event.image
        self._changed.beat()
