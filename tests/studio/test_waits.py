"""The clock on the wall is set, forward by a day and back: no duration follows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mochi_app.jobs import Job, JobStatus
from mochi_app.studio.studio import Studio
from tests.clocks import DAY, Clock
from tests.conftest import close_studio, eventually
from tests.studios import samples

MakeStudio = Callable[..., Awaitable[Studio]]


async def made(studio: Studio, **parameters: Any) -> Job:
    job = await studio.submit(**({"prompt": "p"} | parameters))
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    return studio.find(job.id)


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
