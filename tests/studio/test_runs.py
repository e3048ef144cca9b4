"""A run from its claim to its end: deaths, retries, cancels, checkpoints."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.studio.live import Live
from mochi_app.studio.scheduling import Speeds
from tests.conftest import close_studio, eventually
from tests.studios import MakeStudio, checkpoints, ended, running


async def test_the_same_request_gives_the_same_frames(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    one, two = [await ended(studio, await studio.submit(prompt="p", seed=7)) for _ in range(2)]
    assert one.id != two.id
    assert one.hashes == two.hashes


async def test_a_killed_process_costs_its_job_one_more_attempt(
    make_studio: MakeStudio, tmp_path: Path
) -> None:
    studio = await make_studio(slots="cpu;cpu")
    await eventually(lambda: studio.pool.ready_or_busy == 2)
    neighbour_pid = studio.pool.slots[1].slot.pids
    job = await studio.submit(prompt=f"kill once {tmp_path / 'flag'}")
    neighbour = await studio.submit(prompt="slow", num_inference_steps=40)
    job, neighbour = await ended(studio, job), await ended(studio, neighbour)
    assert job.status is JobStatus.COMPLETED
    assert job.attempts == 2
    assert neighbour.attempts == 1
    assert studio.pool.slots[1].slot.pids == neighbour_pid


async def test_a_job_that_kills_its_process_twice_fails_and_the_next_one_runs(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    bad = await studio.submit(prompt="kill")
    good = await studio.submit(prompt="p")
    bad, good = await ended(studio, bad), await ended(studio, good)
    assert bad.status is JobStatus.FAILED
    assert bad.error is not None
    assert bad.error.startswith("poison: 2 slots died of it and it came no further; at step 1 of 8")
    assert "SIGKILL" in bad.error
    assert good.status is JobStatus.COMPLETED


async def test_a_job_that_comes_further_each_time_is_no_poison(make_studio: MakeStudio) -> None:
    studio = await make_studio(checkpoint_steps=4)
    job = await studio.submit(prompt="kill on 6", num_inference_steps=17)
    await eventually(lambda: studio.status(job.id)["resumed_step"] == 8, "the third attempt")
    assert studio.status(job.id)["step"] >= 8
    job = await ended(studio, job)
    assert (job.status, job.attempts, job.resumed_step) == (JobStatus.COMPLETED, 4, 12)
    assert [death[:16] for death in job.deaths] == ["at step 13 of 17"]
    await eventually(lambda: not checkpoints(studio), "the end of its checkpoint")


async def test_a_job_that_comes_further_each_time_is_given_up_in_the_end(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mochi_app.studio.runs.MAX_ATTEMPTS", 3)
    studio = await make_studio(checkpoint_steps=4)
    job = await ended(studio, await studio.submit(prompt="kill on 6", num_inference_steps=17))
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error.startswith("the engine died 3 times on it, last at step 13 of 17: rank 0 (pid")
    await eventually(lambda: not checkpoints(studio), "the end of its checkpoint")


async def test_deaths_of_a_job_are_counted_over_restarts_of_the_server(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(checkpoint_steps=4, restart_backoff=60, restart_backoff_max=60)
    job = await studio.submit(prompt="kill at 6")
    await eventually(lambda: studio.find(job.id).deaths, "the first death")
    await close_studio(studio)
    again = await make_studio(checkpoint_steps=4)
    job = await ended(again, job)
    assert (job.status, job.attempts) == (JobStatus.FAILED, 2)
    assert job.error is not None
    assert job.error.startswith("poison: 2 slots died of it and it came no further; at step 5 of 8")
    assert job.error.count("SIGKILL") == 2


async def test_a_slot_that_ends_through_no_fault_of_the_job_costs_no_attempt(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=20)
    for _ in range(3):
        await running(studio, job)
        slot = studio.pool.slots[0].slot
        slot.blameless = True
        slot.kill("the model was updated")
        await eventually(lambda: studio.find(job.id).status is JobStatus.PENDING, "the queue")
    job = await ended(studio, job)
    assert (job.status, job.attempts, list(job.deaths)) == (JobStatus.COMPLETED, 1, [])


async def test_a_cancelled_job_leaves_no_checkpoint(make_studio: MakeStudio) -> None:
    studio = await make_studio(checkpoint_steps=2, restart_backoff=60, restart_backoff_max=60)
    job = await studio.submit(prompt="kill at 6")
    await eventually(lambda: studio.find(job.id).deaths, "its death")
    assert checkpoints(studio) == [job.id]
    await studio.cancel(job.id)  # its run may just be ending
    await eventually(lambda: checkpoints(studio) == [], "no checkpoint")
    assert studio.find(job.id).status is JobStatus.CANCELLED


async def test_cancel_of_a_running_job_frees_the_slot(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=500)
    await running(studio, job)
    pids = studio.pool.slots[0].slot.pids
    await studio.cancel(job.id)
    assert (await ended(studio, job)).status is JobStatus.CANCELLED
    after = await ended(studio, await studio.submit(prompt="p"))
    assert after.status is JobStatus.COMPLETED
    assert studio.pool.slots[0].slot.pids == pids


async def test_cancels_at_any_moment_leave_one_end_and_a_working_slot(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(slots="cpu;cpu")
    jobs = [await studio.submit(prompt="p", num_inference_steps=20) for _ in range(24)]

    async def cancel_after(seconds: float, job: Job) -> None:
        await asyncio.sleep(seconds)
        await studio.cancel(job.id)

    await asyncio.gather(*(cancel_after(index * 0.05, job) for index, job in enumerate(jobs)))
    ends = [await ended(studio, job) for job in jobs]
    for job in ends:
        there = studio.media.video_path(job.id) is not None
        assert there == (job.status is JobStatus.COMPLETED), job.status
    last = await ended(studio, await studio.submit(prompt="p"))
    assert last.status is JobStatus.COMPLETED
    await eventually(lambda: studio.dispatch.tickets_needed == 0)


async def test_a_cancel_of_a_job_whose_slot_just_died_is_kept(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    requeue = studio._runs._interrupted

    async def requeue_and_be_cancelled(job: Job, live: Live, reason: str) -> None:
        await requeue(job, live, reason)
        await studio.cancel(job.id)

    monkeypatch.setattr(studio._runs, "_interrupted", requeue_and_be_cancelled)
    job = await studio.submit(prompt="slow", num_inference_steps=400)
    await running(studio, job)
    os.kill(studio.pool.slots[0].slot.pids[0], signal.SIGKILL)
    assert (await ended(studio, job)).status is JobStatus.CANCELLED


async def test_a_cancel_stops_the_run_though_the_store_refuses_it(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=400)
    await running(studio, job)
    update = studio.history.update

    async def first_refuses(job_id: str, change: Callable[[Job], Job]) -> Job:
        monkeypatch.setattr(studio.history, "update", update)
        raise HistoryError("the disk is full")

    monkeypatch.setattr(studio.history, "update", first_refuses)
    assert (await studio.cancel(job.id)).id == job.id
    assert (await ended(studio, job)).status is JobStatus.CANCELLED


async def test_a_cancel_outlives_a_store_that_refuses_the_start(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    update = studio.history.update
    refusals = iter([HistoryError("the disk is full")])

    async def refusing(job_id: str, change: Callable[[Job], Job]) -> Job:
        if change(studio.find(job_id)).status is JobStatus.PROCESSING:
            for refusal in refusals:
                await studio.cancel(job_id)
                raise refusal
        return await update(job_id, change)

    monkeypatch.setattr(studio.history, "update", refusing)
    job = await studio.submit(prompt="p")
    assert (await ended(studio, job)).status is JobStatus.CANCELLED
    assert next(refusals, None) is None


async def test_a_job_that_a_slot_died_of_has_the_time_of_a_machine_not_measured(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(step_timeout=60)
    job = await ended(studio, await studio.submit(prompt="p"))
    studio.live.speeds = Speeds(denoise=1e-12, other=0)  # whatever this machine is busy with
    assert studio._runs._timeouts(job).step == pytest.approx(20)
    assert studio._runs._timeouts(replace(job, deaths=["at step 3"])).step == 60
