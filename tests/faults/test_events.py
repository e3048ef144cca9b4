"""Harms to those who watch: a long queue, and more changes than a page can be told of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import records
from tests.conftest import eventually
from tests.listening import Heard, address, listening
from tests.serving import Served

Serve = Callable[..., Served]
SHOWN = 24  # jobs on a page of the history
MOST_BYTES, MOST_HIDDEN = 15_000, 3_000  # a second and page
LIFE = ["PENDING", "PROCESSING", "COMPLETED"]


def test_pages_beside_a_long_queue(serve: Serve, tmp_path: Path) -> None:
    """1,000 jobs wait and one runs: a page receives every change of the jobs it shows in at most 15
    KB a second, a hidden one in 3 KB."""
    jobs = records.queue_up(tmp_path / "data", 1001, "slow pictured")
    served = serve("ok", MOCHI_MAX_PENDING="1100").ready()
    asyncio.run(watch_the_first(served, jobs))


async def watch_the_first(served: Served, jobs: list[str]) -> None:
    """Three jobs are made, beside the newest ones, which wait."""
    first, newest = jobs[:3], jobs[-SHOWN:]
    visible, hidden = Heard(), Heard()
    began = time.monotonic()
    seen = address([*first, *newest], pictures=first)
    async with (
        listening(visible, served.url, seen),
        listening(hidden, served.url, address(first, hidden="true")),
    ):
        await eventually(lambda: visible.status(first[2]) == "COMPLETED", "the third video", 60)
        rate = visible.bytes / (time.monotonic() - began)
        await eventually(lambda: hidden.status(first[2]) == "COMPLETED", "it, out of sight", 60)
        hidden_rate = hidden.bytes / (time.monotonic() - began)
    assert rate <= MOST_BYTES
    assert hidden_rate <= MOST_HIDDEN
    assert visible.statuses[first[2]] == LIFE
    assert all(visible.jobs[job]["video_url"] for job in first)
    assert visible.steps[first[2]] > 8
    assert visible.pictures[first[2]] >= 3
    assert visible.statuses[newest[0]] == ["PENDING"]
    assert 900 < visible.jobs[newest[0]]["position"] < 1000
    assert visible.head["pending"] <= 998
    assert not hidden.pictures


def test_a_storm_of_changes(serve: Serve, tmp_path: Path) -> None:
    """Jobs with prompts of 2,000 characters end many times a second, each changing the positions of
    all waiting jobs: a page hears of it at its own pace, and of how each of its jobs ends."""
    jobs = records.queue_up(tmp_path / "data", 150, "word " * 400, num_inference_steps=2)
    served = serve("ok", MOCHI_MAX_PENDING="1100").ready()
    asyncio.run(watch_all(served, jobs))


async def watch_all(served: Served, jobs: list[str]) -> None:
    """A page that shows the newest jobs, until all are made."""
    heard, named = Heard(), jobs[-SHOWN:]
    async with listening(heard, served.url, address(named)):
        await eventually(lambda: heard.events, "the first event", 60)
        began, opened = time.monotonic(), heard.bytes
        await eventually(lambda: heard.head["pending"] < SHOWN, "the last jobs", 60)
        rate = (heard.bytes - opened) / (time.monotonic() - began)
        ended = lambda: all(heard.status(job) == "COMPLETED" for job in named)  # noqa: E731
        await eventually(ended, "the end of all", 60)
    assert rate <= MOST_BYTES
    assert heard.jobs[named[0]]["prompt"].startswith("word")
