"""The parent side of one slot: start its rank processes, talk to them, notice when they fail.

A slot owns processes and deadlines, not policy: when it dies it reports why (`SlotDied`) and stays
down until `start()` is called again; `pool.py` decides when. It does not know the history, and it
names the engine (`python -m mochi_app.engine.rank`) instead of importing it, so torch is never
loaded here.

What is watched, and what each catches:
    the exit of a process    kills, crashes, exits
    the heartbeat            a frozen process, or a frozen machine
    progress of the job      a hang while the heartbeat thread keeps running
    the start and load times a start that never ends
    the cancel time          a step so long that a cancel would not free the device
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mochi_app import messages
from mochi_app.cancels import unbroken
from mochi_app.codec import ProtocolError
from mochi_app.messages import Message
from mochi_app.setting_types import SlotSpec, Timeouts
from mochi_app.settings import Settings
from mochi_app.slots.deadlines import Deadlines
from mochi_app.slots.job_run import JobCancelled, JobFailed, JobRun
from mochi_app.slots.rank_process import RankProcess

log = logging.getLogger(__name__)

ENGINE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "mochi_app.engine.rank")
FOLLOW_GRACE = 1.0  # seconds that other ranks may be behind the first at the end of a job


class SlotState(StrEnum):
    """What a slot is doing; only READY takes a job."""

    DOWN = "down"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"


class SlotDied(RuntimeError):
    """The processes of a slot are gone. The message says how they ended."""


async def first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait until one of the futures is done, at most `timeout` seconds; none is cancelled."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


class Slot:
    """A group of devices with its persistent rank processes.

    `on_change` is called, on the loop, whenever `state` or `detail` changes.
    """

    def __init__(
        self,
        index: int,
        spec: SlotSpec,
        settings: Settings,
        scratch: Path,
        *,
        threads: int = 0,
        command: Sequence[str] = ENGINE_COMMAND,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.index = index
        self.spec = spec
        self.scratch = scratch
        self.model: Path | None = None  # the folder to load, if not the one that the settings name
        self.video = (0, 0, 0)  # height, width, frames that must fit; see `messages.Configure`
        self.state = SlotState.DOWN
        self.detail = "not started"
        self.since = time.monotonic()
        self.epoch = 0
        self.blameless = False  # its last end was not the slot's fault
        self.versions: dict[str, str] = {}
        self.load_seconds: float | None = None
        self._settings = settings
        self._threads = threads
        self._command = command
        self._on_change = on_change
        self._timeouts = settings.timeouts
        self._ranks: list[RankProcess] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._deadlines = Deadlines()
        self._burial = asyncio.Lock()
        self._all_ready: asyncio.Future[None] | None = None
        self._death: asyncio.Future[str] | None = None
        self._losing = False  # a rank's channel has ended, and `_death` is about to say how
        self._run: JobRun | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank; empty when down."""
        return [rank.pid for rank in self._ranks if rank.pid is not None]

    @property
    def gpu_bytes(self) -> list[int | None]:
        """GPU memory that each rank holds; None without a GPU or a report."""
        return [rank.gpu_bytes for rank in self._ranks]

    @property
    def dying(self) -> bool:
        """Whether its processes are gone or about to be, even if `state` does not show it yet."""
        return self._losing or (self._death is not None and self._death.done())

    @property
    def job_id(self) -> str | None:
        """The job that runs here."""
        return self._run.job_id if self._run else None

    def _set(self, state: SlotState, detail: str = "") -> None:
        if state is not self.state:
            self.since = time.monotonic()
        self.state, self.detail = state, detail
        self._on_change()

    # Start and end

    async def start(self) -> None:
        """Spawn the ranks and wait until each has loaded its model.

        Raises:
            SlotDied: they did not come up; everything that was started has been ended.
        """
        assert self.state is SlotState.DOWN, f"slot {self.index} is {self.state}"
        loop = asyncio.get_running_loop()
        self.epoch += 1
        self.blameless = self._losing = False
        self._forget_rendezvous()
        self._all_ready, self._death = loop.create_future(), loop.create_future()
        self._ranks = [RankProcess(i, device) for i, device in enumerate(self.spec.devices)]
        many = "processes" if self.spec.world_size > 1 else "process"
        self._set(SlotState.STARTING, f"starting the {many}")
        self._deadlines.set("start", self._settings.start_timeout, "did not report")
        try:
            for rank in self._ranks:
                await rank.spawn(self._command, f"slot {self.index} rank {rank.rank}")
                rank.heard_at = time.monotonic()
                rank.send(self._configuration(rank))
            self._tasks = [asyncio.create_task(self._listen(rank)) for rank in self._ranks]
            self._tasks.append(asyncio.create_task(self._watch()))
            await first_of(self._all_ready, self._death)
        except OSError as error:
            self._die(f"the process could not be started: {error}")
        except asyncio.CancelledError:
            self._die("the start was called off")
            await self._reap()
            raise
        if self._death.done():
            await self._reap()
            raise SlotDied(self._death.result())
        self._set(SlotState.READY)

    def _configuration(self, rank: RankProcess) -> messages.Configure:
        return messages.Configure(
            epoch=self.epoch,
            slot=self.index,
            rank=rank.rank,
            world_size=self.spec.world_size,
            model=str(self.model or self._settings.model),
            device="cpu" if rank.device == "cpu" else "cuda",
            dtype=self._settings.dtype,
            scratch=str(self.scratch),
            threads=self._threads,
            rendezvous=str(self._rendezvous) if self.spec.world_size > 1 else "",
            text_dtype=self._settings.text_dtype,
            vae_dtype=self._settings.vae_dtype,
            attention=self._settings.attention,
            cache_threshold=self._settings.cache_threshold,
            compile=self._settings.compile,
            quantization=self._settings.quantization,
            offload=self._settings.offload,
            lora_dir=str(self._settings.lora_dir or ""),
            height=self.video[0],
            width=self.video[1],
            num_frames=self.video[2],
            log_level=self._settings.log_level,
        )

    @property
    def _rendezvous(self) -> Path:
        """Where the ranks of this start meet; killed ranks leave the file behind."""
        return self.scratch / f"rendezvous-{self.epoch}"

    def _forget_rendezvous(self) -> None:
        with contextlib.suppress(OSError):  # the ranks report a folder that cannot be used
            self._rendezvous.unlink(missing_ok=True)

    async def died(self) -> str:
        """Wait until the processes are gone, and return why. Only after `start()`."""
        assert self._death is not None, f"slot {self.index} was never started"
        reason = await asyncio.shield(self._death)
        await self._reap()
        return reason

    async def stop(self, grace: float = 0.5) -> None:
        """Ask the ranks to end, kill what is left after `grace` seconds, and reap everything."""
        if self._death is None or self.state is SlotState.DOWN:
            return
        for rank in self._ranks:
            rank.send(messages.Shutdown(epoch=self.epoch))
        if self.state is SlotState.READY:
            await asyncio.gather(*(rank.wait(grace) for rank in self._ranks))
        self._die("stopped")
        await self._reap()

    def kill(self, reason: str) -> None:
        """Kill the ranks at once; whatever waits for this slot gets `reason`."""
        self._die(reason)

    def _die(self, reason: str) -> None:
        """Kill all ranks together: peers of a lost rank may be blocked in a collective."""
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        for rank in self._ranks:
            rank.kill()

    async def _reap(self) -> None:
        """Reap every process; afterwards the slot is DOWN. Safe to call concurrently."""
        await unbroken(self._end_everything())

    async def _end_everything(self) -> None:
        async with self._burial:
            await self._end_ranks()

    async def _end_ranks(self) -> None:
        tasks, self._tasks = self._tasks, []
        ranks, self._ranks = self._ranks, []
        for task in tasks:
            task.cancel()
        for rank in ranks:
            await rank.end()
        self._deadlines.clear()
        self._forget_rendezvous()
        if self.state is not SlotState.DOWN:
            reason = self._death.result() if self._death and self._death.done() else ""
            self._set(SlotState.DOWN, reason)

    # Deadlines

    def _progressed(self, job_id: str) -> None:
        self._deadlines.set("step", self._timeouts.step, f"job {job_id} showed no progress")

    async def _watch(self) -> None:
        """Kill the slot when a deadline passes."""
        self._die(await self._deadlines.passed(self._ranks, self._settings.heartbeat_timeout))

    # Messages

    async def _listen(self, rank: RankProcess) -> None:
        try:
            while (message := await rank.receive()) is not None:
                rank.heard_at = time.monotonic()
                if message.epoch == self.epoch:
                    self._take(rank, message)
        except ProtocolError as error:
            self._die(f"{rank.label} broke the protocol: {error}")
            return
        await self._lose(rank)

    async def _lose(self, rank: RankProcess) -> None:
        """Handle the end of a rank's channel: kill its peers at once, since they may be blocked in
        a collective or about to fail in one; the reason is set once its exit status is known."""
        if self.dying:  # for another reason, or because of a peer
            return
        self._losing = True
        for peer in self._ranks:
            if peer is not rank:
                peer.kill()
        await rank.last_words()
        self._die(rank.ending())

    def _take(self, rank: RankProcess, message: Message) -> None:
        match message:
            case messages.Heartbeat():
                rank.gpu_bytes = message.gpu_bytes
            case messages.Loading():
                self._deadlines.drop("start")
                if "load" not in self._deadlines:
                    self._deadlines.set("load", self._settings.load_timeout, "did not load")
                self._set(SlotState.LOADING, message.what)
            case messages.Ready():
                self._take_ready(rank, message)
            case messages.JobEvent() if self._run and message.job_id == self._run.job_id:
                if self._run.take(message, first=rank.rank == 0):
                    self._progressed(message.job_id)

    def _take_ready(self, rank: RankProcess, message: messages.Ready) -> None:
        rank.ready = True
        self.versions = dict(message.versions)
        self.load_seconds = message.seconds
        if all(rank.ready for rank in self._ranks):
            self._deadlines.drop("start", "load")
            if self._all_ready is not None and not self._all_ready.done():
                self._all_ready.set_result(None)

    # Jobs

    async def run(
        self,
        request: messages.Run,
        on_event: Callable[[messages.JobEvent], None],
        timeouts: Timeouts | None = None,
    ) -> messages.Done:
        """Run one job; `on_event` gets its stages, steps and pictures.

        `timeouts` are its deadlines, those of the settings if None.

        Raises:
            JobFailed: the engine reports so.
            JobCancelled: after `cancel()`.
            SlotDied: the processes died meanwhile.
        """
        if self.state is not SlotState.READY or self._death is None:
            raise SlotDied(self.detail or f"slot {self.index} is {self.state}")
        run = self._run = JobRun(request.job_id, self.spec.world_size, on_event)
        self._set(SlotState.BUSY)
        self._timeouts = timeouts or self._settings.timeouts
        self._progressed(request.job_id)
        try:
            for rank in self._ranks:
                rank.send(replace(request, epoch=self.epoch))
            await first_of(run.outcome, self._death)
            return await self._conclude(run)
        finally:
            self._run = None
            self._deadlines.drop("step", "cancel")
            if not self.dying:
                self._set(SlotState.READY)

    async def _conclude(self, run: JobRun) -> messages.Done:
        """The run's outcome: a result that arrived wins over a later death or cancel."""
        assert self._death is not None
        outcome = run.outcome.result() if run.outcome.done() else None
        match outcome:
            case messages.Done():
                return outcome
            case messages.Cancelled():
                raise JobCancelled
            case messages.Failed() if outcome.poisoned:
                self._die(f"the process cannot be used any more: {outcome.error}")
            case messages.Failed():
                if outcome.settled or await self._all_live(run):
                    raise JobFailed(
                        outcome.error, disk_full=outcome.disk_full, unwritten=outcome.unwritten
                    )
        if run.cancelling:
            raise JobCancelled
        await first_of(self._death)
        raise SlotDied(self._death.result())

    async def _all_live(self, run: JobRun) -> bool:
        """Whether no rank was lost. A failure that the ranks did not agree on may come from a lost
        peer, and be read before the end of that peer's channel.

        Ranks that are alive but do not finish the job are waiting for the one that failed.
        """
        if self.spec.world_size == 1:
            return True
        assert self._death is not None
        await first_of(run.all_followed, self._death, timeout=FOLLOW_GRACE)
        if self.dying:
            return False
        if run.following:
            self.blameless = True
            self._die("a job failed, and its ranks start anew")
        return True

    def cancel(self, job_id: str) -> None:
        """Ask the job to stop at its next boundary; the slot is killed if that takes too long."""
        if self._run is None or job_id != self._run.job_id or self._run.cancelling:
            return
        self._run.cancelling = True
        self._deadlines.set("cancel", self._timeouts.cancel, f"job {job_id} did not stop")
        for rank in self._ranks:
            rank.send(messages.Cancel(epoch=self.epoch, job_id=job_id))
