"""`Pulse`: many waiters, one notification."""

from __future__ import annotations

import asyncio


class Changes:
    """Tells everybody who waits that something changed; `count` grows with each beat.

    A waiter that remembers the count it has seen misses nothing between two waits.
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
        """Wait until more than `count` beats have been; return their number."""
        while self.count <= count:
            await self._event.wait()
        return self.count
