"""`Changes`: many waiters, one notification."""

from __future__ import annotations

import asyncio


class Changes:
    """Notifies all waiters that something changed; `count` grows with each beat.

    A waiter that remembers the last count it has seen misses nothing between two waits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def beat(self) -> None:
        """Wake every waiter."""
        self.count += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def after(self, count: int) -> int:
        """Wait until there have been more than `count` beats; return their number."""
        while self.count <= count:
            await self._event.wait()
        return self.count
