"""All slots of this server: keep each alive, lease the ready ones, own what runs on them.

The pool knows nothing about jobs except the tasks that run them. A task belongs to the pool, so a
caller that goes away (a ticket, a browser) cancels nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from mochi_app.errors import without_folders
from mochi_app.logs import about
from mochi_app.model_defaults import load_model_defaults
from mochi_app.platforms import usable_cores
from mochi_app.setting_types import SlotSpec
from mochi_app.settings import Settings
from mochi_app.slots.slot import ENGINE_COMMAND, Slot, SlotDied, SlotState
from mochi_app.weights.events import WeightsError
from mochi_app.weights.fetch import WEIGHTS_COMMAND
from mochi_app.weights.provision import Provision

log = logging.getLogger(__name__)


def threads_per_rank(settings: Settings) -> int:
    """CPU threads of one CPU rank: the setting, or an equal share of the cores."""
    if settings.threads:
        return settings.threads
    ranks = sum(device == "cpu" for slot in settings.slots for device in slot.devices)
    cores = usable_cores()
    return max(1, cores // ranks) if ranks else 0


class SupervisedSlot:
    """A slot as its supervisor sees it: deaths in a row, when it will be restarted."""

    def __init__(self, slot: Slot, provision: Provision) -> None:
        self.slot = slot
        self._provision = provision
        self.leased = False
        self.deaths = 0
        self.renewed = False  # its last end was blameless, and no job has succeeded since
        self.restarts = 0
        self.broken = False
        self.retry_at: float | None = None
        self.reason = ""

    @property
    def ready(self) -> bool:
        """Whether a job can start here now."""
        return self.slot.state is SlotState.READY and not self.slot.dying and not self.leased

    def describe(self) -> dict[str, Any]:
        """State for people and probes, JSON-ready; paths are left to the log."""
        state: str = self.slot.state
        detail = self.slot.detail
        if self.slot.state is SlotState.DOWN:
            state = "broken" if self.broken else "restarting" if self.retry_at else "down"
            detail = self.reason or detail
            if self._provision.detail and not self.retry_at:
                state, detail = "loading", self._provision.detail
        elif self.slot.state in (SlotState.STARTING, SlotState.LOADING):
            detail = f"{detail}, {time.monotonic() - self.slot.since:.0f} s"
        retry = max(0.0, self.retry_at - time.monotonic()) if self.retry_at else None
        return {
            "slot": self.slot.index,
            "devices": str(self.slot.spec),
            "state": state,
            "detail": without_folders(detail),
            "job_id": self.slot.job_id,
            "pids": self.slot.pids,
            "restarts": self.restarts,
            "retry_seconds": None if retry is None else round(retry, 1),
        }


class Pool:
    """The slots and their supervisors. `on_change` is called whenever any slot changes."""

    def __init__(
        self,
        settings: Settings,
        scratch: Callable[[int], Path],
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        weights_command: Sequence[str] = WEIGHTS_COMMAND,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_change = on_change
        self._settings = settings
        self._scratch = scratch
        self._supervisors: list[asyncio.Task[None]] = []
        self._runs: dict[asyncio.Task[None], SupervisedSlot] = {}
        self._stopping = False
        self._provision = Provision(settings, lambda: self.on_change(), weights_command)
        threads = threads_per_rank(settings)
        self.slots = [
            SupervisedSlot(self._make_slot(index, spec, threads, command), self._provision)
            for index, spec in enumerate(settings.slots)
        ]

    def _make_slot(self, index: int, spec: SlotSpec, threads: int, command: Sequence[str]) -> Slot:
        slot = Slot(
            index,
            spec,
            self._settings,
            self._scratch(index),
            threads=threads,
            command=command,
            on_change=lambda: self.on_change(),
        )
        defaults = load_model_defaults(self._settings)
        slot.video = (defaults.height, defaults.width, defaults.num_frames)
        return slot

    def start(self) -> None:
        """Start bringing up all slots; returns at once."""
        assert not self._supervisors, "the pool was started already"
        self._supervisors = [
            asyncio.create_task(self._watch_over(slot), name=f"slot {slot.slot.index}")
            for slot in self.slots
        ]

    async def _watch_over(self, supervised: SupervisedSlot) -> None:
        with about(slot=supervised.slot.index):
            await self._supervise(supervised)

    async def _supervise(self, supervised: SupervisedSlot) -> None:
        """Fetch the model, start, wait for the end, back off, repeat forever."""
        slot = supervised.slot
        while True:
            certain = False
            try:
                slot.model = await self._provision.folder()
                await slot.start()
                supervised.broken, supervised.reason = False, ""
                started = time.monotonic()
                reason = await slot.died()
                if time.monotonic() - started > self._settings.restart_backoff_max:
                    supervised.deaths = 0  # it ran long enough: not a series of failures
            except SlotDied as error:
                reason = str(error)
            except WeightsError as error:
                reason, certain = str(error), not error.retry
            except Exception as error:
                log.exception("slot %d: its supervisor stumbled", slot.index)
                reason = f"{type(error).__name__}: {error}"
                await slot.stop(grace=0)
            self._provision.forget()  # the files may be the cause
            # Restarting the ranks after a job's error is not the slot's fault, unless it repeats:
            # then no job succeeds on this slot.
            supervised.deaths += not slot.blameless or supervised.renewed
            supervised.renewed = slot.blameless
            supervised.restarts += 1
            supervised.reason = reason
            supervised.broken = certain or supervised.deaths >= self._settings.broken_after
            delay = self._backoff(supervised)
            log.warning(
                "slot %d died: %s; restart in %.1f s (death %d in a row)",
                slot.index, reason, delay, supervised.deaths,
            )  # fmt: skip
            supervised.retry_at = time.monotonic() + delay
            self.on_change()
            await asyncio.sleep(delay)
            supervised.retry_at = None

    def _backoff(self, supervised: SupervisedSlot) -> float:
        most = self._settings.restart_backoff_max
        if supervised.broken:
            return most
        deaths = max(1, supervised.deaths)
        return min(most, self._settings.restart_backoff * 2.0 ** (deaths - 1))

    def ready_slot(self) -> SupervisedSlot | None:
        """The first slot that can take a job now."""
        if self._stopping:
            return None
        return next((slot for slot in self.slots if slot.ready), None)

    @property
    def ready_or_busy(self) -> int:
        """Number of slots with a loaded model."""
        good = (SlotState.READY, SlotState.BUSY)
        return sum(slot.slot.state in good for slot in self.slots)

    def run(
        self, supervised: SupervisedSlot, work: Callable[[Slot], Coroutine[Any, Any, bool]]
    ) -> asyncio.Task[None]:
        """Lease a ready slot to `work` until it returns; if it returns True, the slot's deaths are
        cleared."""
        assert supervised.ready, f"slot {supervised.slot.index} is not ready"
        supervised.leased = True
        task = asyncio.create_task(self._run(supervised, work))
        self._runs[task] = supervised
        task.add_done_callback(self._runs.pop)
        return task

    async def _run(
        self, supervised: SupervisedSlot, work: Callable[[Slot], Coroutine[Any, Any, bool]]
    ) -> None:
        try:
            if await work(supervised.slot):
                supervised.deaths, supervised.renewed = 0, False
        except Exception:
            log.exception("slot %d: a run ended unexpectedly", supervised.slot.index)
            supervised.slot.kill("a run ended unexpectedly")
        finally:
            supervised.leased = False
            self.on_change()

    async def stop(self, drain_seconds: float) -> None:
        """Accept no more runs, give the running ones `drain_seconds`, then end every process."""
        self._stopping = True
        if self._runs:
            await asyncio.wait(list(self._runs), timeout=drain_seconds)
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await self._provision.stop()
        await asyncio.gather(*(slot.slot.stop() for slot in self.slots), return_exceptions=True)
        if self._runs:  # their slots are gone, so they end now
            await asyncio.wait(list(self._runs), timeout=drain_seconds)
