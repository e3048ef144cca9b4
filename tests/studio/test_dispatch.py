"""Turns and tickets: how many jobs run, and in which order."""

from __future__ import annotations

import asyncio

from mochi_app.jobs import JobStatus
from tests.conftest import eventually
from tests.studios import MakeStudio, ended, running


async def test_ten_jobs_run_two_at_a_time_in_order_in_the_same_processes(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(slots="cpu;cpu")
    await eventually(lambda: studio.pool.ready_or_busy == 2)
    pids = [slot.slot.pids for slot in studio.pool.slots]
    jobs = [await studio.submit(prompt="slow", num_inference_steps=4) for _ in range(10)]
    most = 0
    while studio.history.count(JobStatus.COMPLETED) < 10:
        most = max(most, sum(slot.slot.state == "busy" for slot in studio.pool.slots))
        assert most <= 2
        await asyncio.sleep(0.01)
    assert most == 2
    assert [slot.slot.pids for slot in studio.pool.slots] == pids
    done = [await ended(studio, job) for job in jobs]
    starts = [job.started_processing_at or 0.0 for job in done]
    assert 0.0 not in starts
    assert starts == sorted(starts)
    assert {job.slot for job in done} == {0, 1}


async def test_a_turn_that_is_cancelled_does_not_touch_the_run(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="slow", num_inference_steps=10)
    turn = asyncio.create_task(studio.dispatch.engine_turn())
    await running(studio, job)
    turn.cancel()
    assert (await ended(studio, job)).status is JobStatus.COMPLETED


async def test_a_run_whose_ticket_is_gone_asks_for_no_other(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="slow", num_inference_steps=400)
    turn = asyncio.create_task(studio.dispatch.engine_turn())
    await running(studio, job)
    assert studio.dispatch.tickets_needed == 1
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    assert studio.dispatch.tickets_needed == 0
    await studio.cancel(job.id)
    assert (await ended(studio, job)).status is JobStatus.CANCELLED


async def test_a_turn_without_work_ends_at_once(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    assert await asyncio.wait_for(studio.dispatch.engine_turn(), 1) is None


async def test_tickets_needed_follow_the_work_up_to_one_more_than_the_slots(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(turns=False, slots="cpu;cpu")
    needed = [studio.dispatch.tickets_needed]
    for _ in range(5):
        await studio.submit(prompt="p")
        needed.append(studio.dispatch.tickets_needed)
    assert needed == [0, 1, 2, 3, 3, 3]
