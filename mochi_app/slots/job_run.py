"""One job on the ranks of a slot: their messages about it, and its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mochi_app import messages


class JobFailed(RuntimeError):
    """The engine reported that the job failed; the slot may still be healthy."""

    def __init__(self, error: str, *, disk_full: bool = False, unwritten: bool = False) -> None:
        super().__init__(error)
        self.disk_full = disk_full
        self.unwritten = unwritten


class JobCancelled(Exception):
    """The job stopped because it was cancelled."""


class JobRun:
    """One run of one job. Create it on the event loop.

    `outcome` is its final message: Done, Failed or Cancelled. `all_followed` is done when the ranks
    other than the first have finished their part; `following` of them have not.
    """

    def __init__(
        self, job_id: str, world_size: int, on_event: Callable[[messages.JobEvent], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.job_id = job_id
        self.outcome: asyncio.Future[messages.JobEvent] = loop.create_future()
        self.all_followed: asyncio.Future[None] = loop.create_future()
        self.following = world_size - 1
        self.cancelling = False
        self._on_event = on_event

    def take(self, message: messages.JobEvent, *, first: bool) -> bool:
        """Handle a message about this job from the `first` or another rank; whether it is
        progress."""
        match message:
            case messages.Followed():
                self.following -= 1
                if not self.following and not self.all_followed.done():
                    self.all_followed.set_result(None)
            case messages.Failed():  # from any rank
                self._settle(message)
            case _ if not first:
                pass
            case messages.Done() | messages.Cancelled():
                self._settle(message)
            case _:
                self._on_event(message)
                return isinstance(message, messages.Step | messages.Stage | messages.Tiles)
        return False

    def _settle(self, message: messages.JobEvent) -> None:
        if not self.outcome.done():
            self.outcome.set_result(message)
