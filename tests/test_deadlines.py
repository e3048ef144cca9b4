"""A slot's deadlines: what passes first is the reason, and time that we stood does not count."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from mochi_app.slots.deadlines import Deadlines
from tests.conftest import eventually


@dataclass
class Heard:
    """A rank, as far as its heartbeat goes."""

    label: str = "rank 0 (pid 1)"
    heard_at: float = field(default_factory=time.monotonic)


async def reason(deadlines: Deadlines, *ranks: Heard, silence: float = 60.0) -> str:
    return await asyncio.wait_for(deadlines.passed(ranks, silence), 20)


async def test_the_one_that_passes_is_the_reason() -> None:
    deadlines = Deadlines()
    deadlines.set("load", 60, "did not load")
    deadlines.set("step", 0.01, "showed no progress")
    assert await reason(deadlines) == "showed no progress within 0.01 seconds"


async def test_a_silent_rank_is_named() -> None:
    silent = Heard("rank 1 (pid 2)", heard_at=time.monotonic() - 5)
    told = await reason(Deadlines(), Heard(), silent, silence=4)
    assert told == "rank 1 (pid 2) sent no heartbeat for 4 seconds"


async def test_what_is_dropped_or_set_anew_does_not_pass() -> None:
    deadlines = Deadlines()
    for name in ("start", "load", "step"):
        deadlines.set(name, 0, "is over")
    deadlines.drop("start", "load", "cancel")
    assert "start" not in deadlines
    assert "step" in deadlines
    deadlines.set("step", 0.02, "is due")
    assert await reason(deadlines) == "is due within 0.02 seconds"
    deadlines.clear()
    assert "step" not in deadlines


async def test_time_in_which_we_stood_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour passes between two looks, and then only what was late before it has passed."""
    clock, ahead = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead)
    deadlines, rank = Deadlines(), Heard()
    deadlines.set("step", 50, "showed no progress")
    waiting = asyncio.create_task(deadlines.passed([rank], 40))
    heard = rank.heard_at
    await asyncio.sleep(0)  # it has looked at the clock
    ahead = 3600.0
    await eventually(lambda: rank.heard_at > heard, "a second look")
    assert not waiting.done()
    assert heard + 3500 < rank.heard_at <= time.monotonic()
    rank.heard_at -= 41
    assert "no heartbeat" in await asyncio.wait_for(waiting, 20)


async def test_nothing_is_heard_later_than_now() -> None:
    deadlines, rank = Deadlines(), Heard()
    now = rank.heard_at + 1
    deadlines.forgive([rank], now, late=5)
    assert rank.heard_at == now
