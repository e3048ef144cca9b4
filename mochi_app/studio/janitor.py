"""Housekeeping while the server runs: records that do not match files, the trash, the quota."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from mochi_app.errors import HistoryError
from mochi_app.studio.disk_space import DiskSpace
from mochi_app.studio.live import LiveJobs
from mochi_app.studio.recovery import Recovery
from mochi_app.studio.retention import Retention

log = logging.getLogger(__name__)

JANITOR_SECONDS = 60.0
JANITOR_RETRY_SECONDS = 5.0  # after a failure such as a full disk


class Janitor:
    """Runs every minute, or when it is called."""

    def __init__(
        self,
        live: LiveJobs,
        disk: DiskSpace,
        recovery: Recovery,
        retention: Retention,
        trash_hours: float,
    ) -> None:
        self._live = live
        self._disk = disk
        self._recovery = recovery
        self._retention = retention
        self._trash_hours = trash_hours
        self._called = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task."""
        self._task = asyncio.create_task(self._run(), name="janitor")

    def call(self) -> None:
        """Run now instead of at the next minute."""
        self._called.set()

    async def stop(self) -> None:
        """Stop the task, wherever it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._live.forget_ended()
            try:
                await self._disk.measure()
                await self._recovery.repair()
                await self._retention.empty_trash(older_than_hours=self._trash_hours)
                await self._retention.enforce_quota()
            except (HistoryError, OSError) as error:  # reported by the history, or by the outputs
                log.warning("no housekeeping now: %s", error)
                await asyncio.sleep(JANITOR_RETRY_SECONDS)
                self._called.set()
            except Exception:
                log.exception("housekeeping failed; it is tried again")
                await asyncio.sleep(JANITOR_RETRY_SECONDS)
                self._called.set()
            # Not `wait_for`, which may lose a cancel that arrives with the event (Python 3.11)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(JANITOR_SECONDS):
                    await self._called.wait()
            self._called.clear()
