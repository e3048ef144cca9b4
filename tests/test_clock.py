"""The clock on the wall is set, forward by a day and back: no duration follows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.store.backups import Backups, list_backups
from mochi_app.studio.studio import Studio
from tests.conftest import close_studio, eventually
from tests.test_metrics import samples

MakeStudio = Callable[..., Awaitable[Studio]]
DAY = 25 * 3600.0


class Clock:
    """The wall clock, set by tests, and an hour hand that no setting moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        self.later = 0.0
        wall, steady = time.time, time.monotonic
        monkeypatch.setattr(time, "time", lambda: wall() + self.ahead + self.later)
        self.steady = lambda: steady() + self.later


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def made(studio: Studio, **parameters: Any) -> Job:
    job = await studio.submit(**({"prompt": "p"} | parameters))
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    return studio.find(job.id)


async def test_the_trash_outlives_a_clock_that_is_set_forward_and_back(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio()
    before = await made(studio)
    await studio.delete(before.id)
    clock.ahead = DAY
    assert await studio.shelf.empty_trash(older_than_hours=24) == 0
    meanwhile = await made(studio)
    await studio.delete(meanwhile.id)
    clock.ahead = 0
    assert await studio.shelf.empty_trash(older_than_hours=24) == 0
    await studio.restore(before.id)
    assert studio.media.video_path(before.id) is not None


async def test_the_trash_outlives_a_restart_with_a_wrong_clock(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio()
    job = await made(studio)
    await studio.delete(job.id)
    for ahead in (DAY, 400 * DAY, 0.0):
        await close_studio(studio)
        clock.ahead = ahead
        studio = await make_studio()
        assert await studio.shelf.empty_trash(older_than_hours=24) == 0
    await studio.restore(job.id)


async def test_what_was_long_in_the_trash_goes_whatever_the_clock_says(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio()
    clock.ahead = 400 * DAY  # deleted in the far future, it seems
    job = await made(studio)
    await studio.delete(job.id)
    clock.ahead = 0
    ahead = 0.0  # of the clock that does not stand still, hours

    def monotonic() -> float:
        return time.monotonic() + ahead * 3600

    for hours in (10, 10, 3):  # of three servers
        ahead = hours
        studio.history._store._clock = monotonic
        assert await studio.shelf.empty_trash(older_than_hours=24) == 0
        await close_studio(studio)
        studio = await make_studio()
    assert studio.history.uptime >= 23 * 3600
    studio.history._store._clock = lambda: time.monotonic() + 3700
    await studio.shelf.empty_trash(older_than_hours=24)  # unless the janitor was first
    assert studio.history.get(job.id) is None


async def test_what_an_earlier_version_put_into_the_trash_begins_to_count_now(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    job = await made(studio)
    await studio.delete(job.id)
    await studio.history.update(job.id, lambda job: replace(job, deleted_uptime=None))
    await studio.history.update(job.id, lambda job: replace(job, deleted_at=1.0))
    assert await studio.shelf.empty_trash(older_than_hours=1) == 0
    studio.history._store._clock = lambda: time.monotonic() + 3700
    assert await studio.shelf.empty_trash(older_than_hours=1) == 1


async def test_waits_and_runs_are_measured_by_a_clock_that_nobody_sets(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio()
    await eventually(lambda: studio.pool.ready_slot() is not None, "a slot")
    first = await studio.submit(prompt="slow", num_inference_steps=10)
    second = await studio.submit(prompt="p")
    await eventually(lambda: studio.status(first.id)["step"] >= 1, "a step")
    clock.ahead = DAY
    await eventually(lambda: studio.find(second.id).status is JobStatus.COMPLETED, "the videos")
    third = await studio.submit(prompt="slow", num_inference_steps=10)
    await eventually(lambda: studio.status(third.id)["step"] >= 1, "a step")
    clock.ahead = 0
    await eventually(lambda: studio.find(third.id).status is JobStatus.COMPLETED, "the video")
    counted = "mochi_job_run_seconds_count{kind=preview}"
    await eventually(lambda: samples(studio)[counted] == 3, "three runs")
    told = samples(studio)
    for name in ("wait", "run"):
        assert told[f"mochi_job_{name}_seconds_count{{kind=preview}}"] == 3
        assert 0 < told[f"mochi_job_{name}_seconds_sum{{kind=preview}}"] < 120


async def test_the_wait_of_a_job_from_before_a_restart_is_counted_from_the_restart(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await close_studio(studio)
    clock.ahead = DAY
    studio = await make_studio()
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    assert 0 < samples(studio)["mochi_job_wait_seconds_sum{kind=preview}"] < 120


async def test_jobs_of_the_hours_that_were_not_take_their_turn(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio(turns=False)
    studio.live.speeds.denoise = studio.live.speeds.other = 1e-9
    first = await studio.submit(prompt="p")
    clock.ahead = DAY
    second = await studio.submit(prompt="p")
    clock.ahead = -DAY
    third = await studio.submit(prompt="p")
    clock.ahead = 0
    fourth = await studio.submit(prompt="p")
    jobs = [first, second, third, fourth]
    for _ in range(2):
        assert [studio.status(job.id)["position"] for job in jobs] == [1, 2, 3, 4]
        assert [job["id"] for job in studio.list_jobs()["jobs"]] == [job.id for job in jobs[::-1]]
        await close_studio(studio)
        studio = await make_studio(turns=False)
        studio.live.speeds.denoise = studio.live.speeds.other = 1e-9


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


def test_ids_grow_while_the_clock_goes_forward_and_back(clock: Clock) -> None:
    ids, drawn = JobIds(), []
    for ahead in (0, DAY, 0, -DAY, 0):
        clock.ahead = ahead
        drawn.append(ids.draw())
    assert drawn == sorted(drawn)
