"""Watch one job to its end: its view whenever it changes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from mochi_app.changes import Changes
from mochi_app.jobs import Job
from mochi_app.studio.live import is_news

ETA_PAUSE = 5.0  # seconds between two views that differ only by the countdown


async def watch(
    find: Callable[[], Job],
    view_of: Callable[[Job], dict[str, Any]],
    changed: Changes,
    *,
    stopping: Callable[[], bool],
    interval: float,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the job's view whenever it changes, until it has ended or the server is `stopping`: a
    new status at once, steps at most every `interval` seconds, a mere countdown (an ETA) every
    `ETA_PAUSE`. Whatever `find` raises ends the watch.
    """
    last: dict[str, Any] | None = None
    next_at = 0.0
    while True:
        count = changed.count
        job = find()
        pause = next_at - time.monotonic()
        moved = last is None or job.status != last["status"]
        if moved or stopping() or pause <= 0:
            view, now = view_of(job), time.monotonic()
            age = now - next_at + interval  # of `last`
            if last is None or is_news(last, view, age) or (view != last and age >= ETA_PAUSE):
                yield view
                last, next_at = view, now + interval
            if job.status.terminal or stopping():
                return
            await changed.after(count)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await changed.after(count)
