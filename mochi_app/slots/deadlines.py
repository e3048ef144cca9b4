"""What must happen on a slot by when, on a clock that pauses while this process is stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

WATCH_INTERVAL = 0.1  # seconds between checks of the deadlines


@dataclass(frozen=True)
class Deadline:
    """The moment (`time.monotonic()`) by which something must happen, and the reason if not."""

    at: float
    reason: str


class Rank(Protocol):
    """Sends heartbeats, the last at `heard_at` (`time.monotonic()`); `label` is for people."""

    heard_at: float

    @property
    def label(self) -> str: ...


class Deadlines:
    """The deadlines of one slot, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Deadline] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def set(self, name: str, seconds: float, what: str) -> None:
        """Start a deadline: in `seconds`, `what` becomes the reason to end the slot."""
        self._by_name[name] = Deadline(
            time.monotonic() + seconds, f"{what} within {seconds:g} seconds"
        )

    def drop(self, *names: str) -> None:
        """Drop deadlines that were met or no longer matter."""
        for name in names:
            self._by_name.pop(name, None)

    def clear(self) -> None:
        """Drop all deadlines."""
        self._by_name.clear()

    async def passed(self, ranks: Sequence[Rank], silence: float) -> str:
        """Wait until a deadline has passed or a rank has been silent for `silence` seconds, and
        return the reason."""
        now = time.monotonic()
        while True:
            due = now + WATCH_INTERVAL
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            self.forgive(ranks, now, max(0.0, now - due))
            for rank in ranks:
                if now - rank.heard_at > silence:
                    return f"{rank.label} sent no heartbeat for {silence:g} seconds"
            for deadline in self._by_name.values():
                if now > deadline.at:
                    return deadline.reason

    def forgive(self, ranks: Sequence[Rank], now: float, late: float) -> None:
        """Extend all deadlines by the seconds for which this process itself was held up (stopped,
        suspended or starved): messages sent meanwhile were not read, or not sent."""
        for rank in ranks:
            rank.heard_at = min(now, rank.heard_at + late)
        for name, deadline in self._by_name.items():
            self._by_name[name] = replace(deadline, at=deadline.at + late)
