"""The task that keeps house."""

from __future__ import annotations

import asyncio

import pytest

from mochi_app.store.backups import Backups, list_backups
from tests.clocks import DAY, Clock
from tests.conftest import eventually
from tests.studios import MakeStudio


@pytest.mark.parametrize("turns_of_the_loop", range(4))
async def test_a_stop_ends_a_janitor_that_was_called_at_that_moment(
    make_studio: MakeStudio, turns_of_the_loop: int
) -> None:
    studio = await make_studio("never", turns=False)
    await eventually(lambda: studio.janitor._called._waiters, "a janitor that waits")
    studio.janitor.call()
    for _ in range(turns_of_the_loop):
        await asyncio.sleep(0)
    janitor = studio.janitor._task
    assert janitor is not None
    janitor.cancel()
    await asyncio.wait([janitor], timeout=5)
    assert janitor.cancelled()


async def test_backups_are_as_many_as_the_hours(make_studio: MakeStudio, clock: Clock) -> None:
    studio = await make_studio(turns=False, backup_hours=0)
    data_dir = studio.settings.data_dir
    backups = Backups(data_dir, hours=24, kept=7, clock=clock.steady)

    async def look(ahead: float, later: float = 0.0) -> int:
        clock.ahead, clock.later = ahead, later
        await studio.submit(prompt="p")
        await asyncio.to_thread(backups._make_due)
        return len(list_backups(data_dir))

    counts = [await look(ahead) for ahead in (0, DAY, 0, -DAY, 400 * DAY, 0)]
    assert counts == [1] * 6
    assert await look(0, later=23 * 3600) == 1
    assert await look(-DAY, later=DAY) == 2
    backups = Backups(data_dir, hours=24, kept=7, clock=clock.steady)
    assert await look(-DAY, later=DAY) == 2  # just made
    backups = Backups(data_dir, hours=24, kept=7, clock=clock.steady)
    assert [await look(-9 * DAY, later=DAY) for _ in range(3)] == [3] * 3  # when, nobody knows
