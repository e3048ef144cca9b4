"""The studio over a real history and real processes; only the model is faked."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict, NotFound, RequestError
from mochi_app.studio import studio as studio_module
from mochi_app.studio.disk_space import video_bytes
from mochi_app.studio.live import Live
from mochi_app.studio.scheduling import Speeds
from mochi_app.studio.studio import Studio
from tests.conftest import DEADLINE, close_studio, eventually

MakeStudio = Callable[..., Awaitable[Studio]]
ACTIVE = (JobStatus.PENDING, JobStatus.PROCESSING)


async def ended(studio: Studio, job: Job) -> Job:
    """The job once it has come to its end."""

    def look() -> Job | None:
        found = studio.history.get(job.id)
        return found if found and found.status.terminal else None

    result = await eventually(look, f"end of {job.id}")
    assert isinstance(result, Job)
    return result


async def running(studio: Studio, job: Job, step: int = 1) -> None:
    await eventually(lambda: studio.status(job.id)["step"] >= step, f"step {step} of {job.id}")


async def test_a_submit_becomes_a_video_with_poster_and_seed(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="  a prompt ")
    assert job.status is JobStatus.PENDING
    assert job.prompt == "a prompt"
    job = await ended(studio, job)
    assert job.status is JobStatus.COMPLETED, job.error
    assert 0 <= job.seed < 2**32
    video, poster = studio.media.video_path(job.id), studio.media.poster_path(job.id)
    assert video is not None
    assert poster is not None
    assert (job.video, job.poster) == (video.name, poster.name)
    assert {"denoise", "decode", "encode"} <= set(job.seconds)
    assert len(job.hashes["frames"]) == 64


async def test_drawn_seeds_differ(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    jobs = [await studio.submit(prompt="p") for _ in range(8)]
    assert len({job.seed for job in jobs}) == 8


async def test_the_same_request_gives_the_same_frames(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    one, two = [await ended(studio, await studio.submit(prompt="p", seed=7)) for _ in range(2)]
    assert one.id != two.id
    assert one.hashes == two.hashes


async def test_enhance_keeps_everything_but_the_steps(make_studio: MakeStudio) -> None:
    studio = await make_studio(enhance_steps=16)
    preview = await ended(
        studio,
        await studio.submit(
            prompt="p", negative_prompt="n", seed=3, guidance_scale=2.5, height=80, num_frames=13
        ),
    )
    enhanced = await ended(studio, await studio.enhance(preview.id))
    assert enhanced.kind == "enhance"
    assert enhanced.enhanced
    assert enhanced.parent_id == preview.id
    assert enhanced.num_inference_steps == 16
    for name in ("prompt", "negative_prompt", "seed", "guidance_scale", "height", "num_frames"):
        assert getattr(enhanced, name) == getattr(preview, name)


async def test_enhance_twice_is_one_job_until_it_failed(make_studio: MakeStudio) -> None:
    studio = await make_studio(enhance_steps=16)
    preview = await ended(studio, await studio.submit(prompt="p"))
    first = await studio.enhance(preview.id)
    assert (await studio.enhance(preview.id)).id == first.id
    await studio.cancel(first.id)
    if (await ended(studio, first)).status is JobStatus.CANCELLED:
        assert (await studio.enhance(preview.id)).id != first.id


async def test_an_enhance_without_a_video_to_come_is_not_the_answer(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(enhance_steps=400)
    preview = await ended(studio, await studio.submit(prompt="slow"))
    first = await studio.enhance(preview.id, owner="ann")
    await running(studio, first)
    await studio.cancel(first.id)
    second = await studio.enhance(preview.id, owner="bob")
    assert second.id != first.id
    await running(studio, second)
    await studio.history.update(
        second.id, lambda job: job.moved(JobStatus.COMPLETED, evicted_at=1.0)
    )
    assert (await studio.enhance(preview.id)).id not in (first.id, second.id)


async def test_two_enhances_at_the_same_moment_are_one_job(make_studio: MakeStudio) -> None:
    studio = await make_studio(enhance_steps=16)
    preview = await ended(studio, await studio.submit(prompt="p"))
    one, two = await asyncio.gather(studio.enhance(preview.id), studio.enhance(preview.id))
    assert one.id == two.id
    lineage = studio.lineage(one.id)
    assert lineage == studio.lineage(preview.id)
    assert lineage["preview"] is not None
    assert lineage["preview"]["id"] == preview.id


async def test_a_preview_of_another_model_is_not_enhanced(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    preview = await ended(studio, await studio.submit(prompt="p"))
    await studio.history.update(preview.id, lambda job: replace(job, model="genmo/mochi"))
    with pytest.raises(Conflict, match="was made by genmo/mochi, this server runs tiny-mochi"):
        await studio.enhance(preview.id)


async def test_what_cannot_be_enhanced_is_refused(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    failed = await ended(studio, await studio.submit(prompt="fail"))
    preview = await ended(studio, await studio.submit(prompt="p"))
    enhanced = await studio.enhance(preview.id)
    unfinished = await studio.submit(prompt="slow", num_inference_steps=100)
    with pytest.raises(Conflict, match="is FAILED"):
        await studio.enhance(failed.id)
    with pytest.raises(Conflict, match="only a preview"):
        await studio.enhance(enhanced.id)
    with pytest.raises(Conflict, match="expected a COMPLETED preview"):
        await studio.enhance(unfinished.id)
    with pytest.raises(NotFound):
        await studio.enhance("0" * 14 + "-" + "0" * 16)


@pytest.mark.parametrize(
    "job_id", ["", "../../etc/passwd", "http://127.0.0.1/x", "a" * 1_000_000, None, 5, ["x"]]
)
async def test_a_malformed_id_is_refused_everywhere(make_studio: MakeStudio, job_id: Any) -> None:
    studio = await make_studio(turns=False)
    for call in (studio.enhance, studio.cancel, studio.delete, studio.restore, studio.star):
        with pytest.raises(RequestError, match="job_id: got"):
            await call(job_id)
    with pytest.raises(RequestError) as refusal:
        studio.status(job_id)
    assert len(str(refusal.value)) < 200


async def test_request_id_makes_a_submit_repeatable(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    first = await studio.submit(prompt="p", request_id="mine")
    again = await studio.submit(prompt="p", request_id="mine")
    assert again.id == first.id
    assert again.seed == first.seed
    with pytest.raises(Conflict, match="prompt"):
        await studio.submit(prompt="another", request_id="mine")
    assert len(studio.history) == 1


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


def checkpoints(studio: Studio) -> list[str]:
    return [folder.name for folder in studio.media.checkpoints.iterdir()]


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


async def test_checkpoints_of_jobs_that_are_gone_are_swept_at_start(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(checkpoint_steps=2)
    job = await studio.submit(prompt="slow", num_inference_steps=60)
    await running(studio, job, step=3)
    await close_studio(studio)
    assert checkpoints(studio) == [job.id]
    (studio.media.checkpoints / ("0" * 14 + "-" + "0" * 16)).mkdir()
    again = await make_studio(turns=False)
    assert checkpoints(again) == [job.id]


async def test_cancel_of_a_waiting_job(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    first = await studio.submit(prompt="slow", num_inference_steps=60)
    waiting = await studio.submit(prompt="p")
    await running(studio, first)
    assert (await studio.cancel(waiting.id)).status is JobStatus.CANCELLED
    assert (await ended(studio, first)).status is JobStatus.COMPLETED
    assert studio.media.video_path(waiting.id) is None


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


async def test_cancel_of_an_ended_job_changes_nothing(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert await studio.cancel(job.id) == job


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


async def test_the_backlog_is_bounded(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False, max_pending=2)
    await studio.submit(prompt="one", request_id="1")
    await studio.submit(prompt="two")
    with pytest.raises(RequestError, match="2 jobs are waiting"):
        await studio.submit(prompt="three")
    assert (await studio.submit(prompt="one", request_id="1")).prompt == "one"


async def test_a_job_that_is_just_being_accepted_counts_once(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False, max_pending=2)
    add, gate = studio.history.add, asyncio.Event()

    async def held(*arguments: Any, **options: Any) -> Job:
        job = await add(*arguments, **options)
        await gate.wait()
        return job

    studio.history.add = held  # type: ignore[method-assign]
    first = asyncio.create_task(studio.submit(prompt="p"))
    await eventually(lambda: studio.history.count(JobStatus.PENDING) == 1)
    second = asyncio.create_task(studio.submit(prompt="p"))
    await eventually(lambda: studio.history.count(JobStatus.PENDING) == 2)
    with pytest.raises(RequestError, match="2 jobs are waiting"):
        await studio.submit(prompt="p")
    gate.set()
    await asyncio.gather(first, second)


async def test_a_restart_keeps_order_and_runs_interrupted_jobs_again(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    jobs = [await studio.submit(prompt="slow", num_inference_steps=60) for _ in range(3)]
    await running(studio, jobs[0])
    await close_studio(studio)
    again = await make_studio()
    done = [await ended(again, job) for job in jobs]
    assert [job.status for job in done] == [JobStatus.COMPLETED] * 3
    assert [job.attempts for job in done] == [1, 1, 1]
    starts = [job.started_processing_at or 0.0 for job in done]
    assert 0.0 not in starts
    assert starts == sorted(starts)


async def crash_after_rename(studio: Studio, job: Job) -> None:
    """What a crash between the rename of a video and its record leaves behind."""
    await studio.history.update(job.id, lambda job: job.moved(JobStatus.PROCESSING, attempts=1))
    (studio.media.videos / f"{job.id}.mp4").write_bytes(b"a whole video")
    (studio.media.posters / f"{job.id}.webp").write_bytes(b"its poster")
    await close_studio(studio)


async def test_a_finished_file_whose_record_is_missing_is_adopted(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await crash_after_rename(studio, job)
    again = await make_studio(turns=False)
    adopted = again.history.get(job.id)
    assert adopted is not None
    assert adopted.status is JobStatus.COMPLETED
    assert (adopted.video, adopted.poster) == (f"{job.id}.mp4", f"{job.id}.webp")


async def test_the_file_of_a_cancelled_job_is_removed_at_start(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await studio.cancel(job.id)
    (studio.media.videos / f"{job.id}.mp4").write_bytes(b"too late")
    await close_studio(studio)
    again = await make_studio(turns=False)
    assert again.media.video_path(job.id) is None
    assert again.status(job.id)["status"] == "CANCELLED"


@pytest.mark.parametrize("where", [JobStatus.PROCESSING, JobStatus.PENDING])
async def test_a_cancel_outlives_its_server(make_studio: MakeStudio, where: JobStatus) -> None:
    """PENDING: its slot had died and it was queued again, when the server was killed as well."""
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await studio.history.update(job.id, lambda job: job.moved(JobStatus.PROCESSING, attempts=1))
    studio.live.claim(job.id)
    cancelled = await studio.cancel(job.id)
    assert (cancelled.status, cancelled.cancel_requested) == (JobStatus.PROCESSING, True)
    checkpoint = studio.media.checkpoint(job.id)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"latents")
    if where is JobStatus.PENDING:
        await studio.history.update(job.id, lambda job: job.moved(where))
        studio.live.release(job.id)
        assert studio.dispatch.waiting == []
    await close_studio(studio)
    again = await make_studio()
    ended = again.status(job.id)
    assert (ended["status"], ended["attempts"]) == ("CANCELLED", 1)
    assert ended["cancel_requested"] is False  # it is done
    assert not checkpoint.exists()


async def test_a_poster_that_stays_does_not_stop_the_start(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await studio.cancel(job.id)
    (studio.media.posters / f"{job.id}.webp").mkdir()  # not to be unlinked
    await close_studio(studio)
    again = await make_studio(turns=False)
    assert again.status(job.id)["status"] == "CANCELLED"


async def test_what_ends_while_others_are_mended_is_left_alone(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio(turns=False)
    jobs = [await studio.submit(prompt="p") for _ in range(2)]
    for job in jobs:
        await studio.history.update(job.id, lambda job: job.moved(JobStatus.PROCESSING))
    studio.live.claim(jobs[1].id)
    update = studio.history.update

    async def meanwhile(job_id: str, change: Callable[[Job], Job]) -> Job:
        monkeypatch.setattr(studio.history, "update", update)
        await update(jobs[1].id, lambda job: job.moved(JobStatus.COMPLETED))
        studio.live.release(jobs[1].id)
        return await update(job_id, change)

    monkeypatch.setattr(studio.history, "update", meanwhile)
    await studio._mender.mend()
    assert [studio.find(job.id).status.value for job in jobs] == ["PENDING", "COMPLETED"]


async def test_a_cancel_that_comes_too_late_leaves_the_video(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await studio.history.update(job.id, lambda job: job.moved(JobStatus.PROCESSING, attempts=1))
    studio.live.claim(job.id)
    await studio.cancel(job.id)
    (studio.media.videos / f"{job.id}.mp4").write_bytes(b"a whole video")
    await close_studio(studio)
    assert (await make_studio(turns=False)).status(job.id)["status"] == "COMPLETED"


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


async def test_trash_hides_restores_and_empties(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    await studio.delete(job.id)
    assert studio.list_jobs()["total"] == 0
    assert studio.list_jobs(deleted=True)["total"] == 1
    assert studio.media.video_path(job.id) is None
    with pytest.raises(NotFound):
        studio.status(job.id)
    await studio.restore(job.id)
    assert studio.media.video_path(job.id) is not None
    assert studio.list_jobs()["total"] == 1
    await studio.delete(job.id)
    assert await studio.shelf.empty_trash(older_than_hours=1) == 0
    assert await studio.empty_trash() == 1
    assert studio.history.get(job.id) is None
    with pytest.raises(NotFound, match="trash"):
        await studio.restore(job.id)
    left = [path for path in studio.media.data_dir.rglob(f"{job.id}*") if path.is_file()]
    assert left == []


async def test_a_job_restored_while_the_trash_is_emptied_stays(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    jobs = [await ended(studio, await studio.submit(prompt="p", seed=i)) for i in range(4)]
    for job in jobs:
        await studio.delete(job.id)
    removing, gate, remove = threading.Event(), threading.Event(), studio.media.remove

    def remove_slowly(job_id: str) -> None:
        removing.set()
        gate.wait(DEADLINE)
        remove(job_id)

    monkeypatch.setattr(studio.media, "remove", remove_slowly)
    emptying = asyncio.create_task(studio.empty_trash())
    await eventually(removing.is_set)
    restoring = asyncio.create_task(studio.restore(jobs[-1].id))
    await asyncio.sleep(0)  # it waits in line now, before the second removal
    gate.set()
    await restoring
    assert await emptying == 3
    assert studio.status(jobs[-1].id)["status"] == "COMPLETED"
    assert studio.media.video_path(jobs[-1].id) is not None


async def test_delete_and_restore_at_once_keep_record_and_file_together(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    for _ in range(10):
        deleting = asyncio.create_task(studio.delete(job.id))
        await eventually(lambda: studio.list_jobs(deleted=True)["total"] == 1)
        await studio.restore(job.id)
        await deleting
        assert studio.status(job.id)["status"] == "COMPLETED"
        assert studio.media.video_path(job.id) is not None


async def test_emptying_twice_at_once_is_no_error(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    for seed in range(3):
        await studio.delete((await ended(studio, await studio.submit(prompt="p", seed=seed))).id)
    assert sum(await asyncio.gather(studio.empty_trash(), studio.empty_trash())) == 3


async def test_start_mends_what_a_crash_left_between_record_and_file(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    restored, evicted = [
        await ended(studio, await studio.submit(prompt="p", seed=seed)) for seed in range(2)
    ]
    studio.media.withhold(restored.id)
    await studio.history.update(evicted.id, lambda job: replace(job, evicted_at=1.0))
    await close_studio(studio)
    again = await make_studio(turns=False)
    assert again.media.video_path(restored.id) is not None
    assert again.media.video_path(evicted.id) is None


async def test_a_running_job_is_not_deleted(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=100)
    with pytest.raises(Conflict, match="cancel it before"):
        await studio.delete(job.id)


async def test_the_quota_evicts_the_oldest_unstarred_video_and_keeps_its_record(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    jobs = [await ended(studio, await studio.submit(prompt="p", seed=i)) for i in range(3)]
    await studio.star(jobs[0].id)
    two = studio.media.size(jobs[0].id) + studio.media.size(jobs[2].id) + 1
    studio.shelf.quota_bytes = two
    await studio.shelf.enforce_quota()
    there = [studio.media.video_path(job.id) is not None for job in jobs]
    assert there == [True, False, True]
    evicted = studio.status(jobs[1].id)
    assert evicted["status"] == "COMPLETED"
    assert evicted["evicted_at"] is not None
    assert evicted["video_url"] is None
    assert evicted["prompt"] == "p"


async def test_a_quota_that_cannot_be_kept_hurts_neither_job_nor_slot(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    pids = studio.pool.slots[0].slot.pids

    def refuse(job_id: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(studio.media, "remove_video", refuse)
    studio.shelf.quota_bytes = video_bytes(job)
    after = await ended(studio, await studio.submit(prompt="p", seed=1))
    assert after.status is JobStatus.COMPLETED
    assert studio.pool.slots[0].slot.pids == pids


async def test_a_quota_full_of_stars_refuses_new_jobs(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    await studio.star(job.id)
    studio.shelf.quota_bytes = video_bytes(job)
    with pytest.raises(RequestError, match="starred"):
        await studio.submit(prompt="p")
    await studio.star(job.id, False)
    assert (await studio.submit(prompt="p")).status in ACTIVE


async def test_a_small_unstarred_video_is_not_room_for_a_large_one(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    starred, small = [await ended(studio, await studio.submit(prompt="p")) for _ in range(2)]
    await studio.star(starred.id)
    studio.media.videos.joinpath(f"{small.id}.mp4").write_bytes(b"x")
    assert studio.media.video_path(small.id) is not None
    studio.shelf.quota_bytes = studio.media.total_bytes()
    with pytest.raises(RequestError, match="starred"):
        await studio.submit(prompt="p")
    assert studio.status(small.id)["evicted_at"] is None


async def test_a_caller_who_goes_away_leaves_nothing_half_done(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    previews = [await studio.submit(prompt="p") for _ in range(7)]
    for preview in previews:
        await ended(studio, preview)

    async def call_and_go(work: Awaitable[Job], patience: int) -> None:
        caller = asyncio.ensure_future(work)
        for _ in range(patience):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    for patience, preview in enumerate(previews, 1):
        await call_and_go(studio.submit(prompt="p"), patience)
        await call_and_go(studio.enhance(preview.id), patience)
    await eventually(lambda: studio.history.count(JobStatus.COMPLETED) == 3 * len(previews))
    for patience in range(1, len(previews)):
        job = await studio.submit(prompt="slow", num_inference_steps=400)
        await call_and_go(studio.cancel(job.id), patience)
        assert (await ended(studio, job)).status is JobStatus.CANCELLED
    assert studio.pool.slots[0].restarts == 0


async def test_a_request_sent_again_is_answered_though_its_lora_is_gone(
    make_studio: MakeStudio, tmp_path: Path
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "ink.safetensors").touch()
    studio = await make_studio(lora_dir=folder)
    job = await studio.submit(prompt="p", seed=1, lora="ink", request_id="r")
    (folder / "ink.safetensors").unlink()
    assert (await studio.submit(prompt="p", seed=1, lora="ink", request_id=" r ")).id == job.id
    with pytest.raises(RequestError, match="lora"):
        await studio.submit(prompt="p", seed=1, lora="ink", request_id="another")


async def test_position_and_eta_are_told_once_measured(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    await ended(studio, await studio.submit(prompt="slow", num_inference_steps=4))
    first = await studio.submit(prompt="slow", num_inference_steps=80)
    rest = [await studio.submit(prompt="slow", num_inference_steps=4) for _ in range(3)]
    await running(studio, first)
    views = [studio.status(job.id) for job in rest]
    assert [view["position"] for view in views] == [1, 2, 3]
    etas = [view["eta_seconds"] for view in views]
    assert None not in etas
    assert etas == sorted(etas)
    assert studio.status(first.id)["eta_seconds"] > 0


async def test_watch_repeats_no_view_while_its_eta_runs_down(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio_module, "ETA_PAUSE", 1000)
    studio = await make_studio()
    long = await studio.submit(prompt="slowest", num_inference_steps=512)
    await running(studio, long)
    work = long.height * long.width * long.num_frames
    studio.live.speeds = Speeds(denoise=1 / (2 * work), other=0)  # as it is: 1 s a step
    waiting = await studio.submit(prompt="behind it", num_inference_steps=2)
    views = []

    async def watch() -> None:
        async for view in studio.watch(waiting.id, interval=0.02):
            views.append(view)

    watching = asyncio.create_task(watch())
    await eventually(lambda: views, "the first view")
    step = studio.status(long.id)["step"]
    await running(studio, long, step + 3)
    assert len(views) == 1
    assert views[0]["eta_seconds"] > 500
    await studio.cancel(long.id)
    await watching
    assert [view["status"] for view in views][-1] == "COMPLETED"


async def test_watch_streams_to_the_end(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=20)
    views = [view async for view in studio.watch(job.id, interval=0.02)]
    steps = [view["step"] for view in views]
    assert steps == sorted(steps)
    assert len(set(steps)) > 5
    assert views[-1]["status"] == "COMPLETED"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "DONE"),
        ("page", -1),
        ("page", 0),
        ("page", 1.5),
        ("page_size", 101),
        ("query", "x" * 5000),
        ("query", 5),
    ],
)
async def test_a_bad_list_is_refused(make_studio: MakeStudio, field: str, value: Any) -> None:
    studio = await make_studio(turns=False)
    with pytest.raises(RequestError, match=f"{field}: got"):
        studio.list_jobs(**{field: value})


async def test_health_tells_why_no_video_can_be_made(make_studio: MakeStudio) -> None:
    studio = await make_studio("fails", broken_after=1)
    assert studio.health()["ok"] is False
    await eventually(lambda: studio.health()["slots"][0]["state"] == "broken")
    assert "weights are truncated" in studio.health()["slots"][0]["detail"]


async def test_a_stop_requeues_what_runs(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="slow", num_inference_steps=500)
    await running(studio, job)
    pid = studio.pool.slots[0].slot.pids[0]
    await studio.stop()
    found = studio.history.get(job.id)
    assert found is not None
    assert found.status is JobStatus.PENDING
    assert found.attempts == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)
    with pytest.raises(RequestError, match="stopping"):
        await studio.submit(prompt="p")


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


async def test_two_cancels_at_once_are_one(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    update = studio.history.update
    refused = asyncio.Event()

    async def first_refuses(job_id: str, change: Callable[[Job], Job]) -> Job:
        if not refused.is_set():
            refused.set()
            raise HistoryError("the disk is full")
        assert job_id not in [one.id for one in studio.dispatch.waiting]
        return await update(job_id, change)

    monkeypatch.setattr(studio.history, "update", first_refuses)
    outcomes = await asyncio.gather(
        studio.cancel(job.id), studio.cancel(job.id), return_exceptions=True
    )
    assert isinstance(outcomes[0], HistoryError)
    assert studio.find(job.id).status is JobStatus.CANCELLED


async def test_a_file_that_stays_does_not_keep_the_others(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    jobs = [await ended(studio, await studio.submit(prompt="p", seed=i)) for i in range(4)]
    for job in jobs[:2]:
        await studio.delete(job.id)
    stuck = {jobs[0].id, jobs[2].id}
    for name in ("remove", "remove_video"):
        removing = getattr(studio.media, name)

        def refuse(job_id: str, removing: Callable[[str], None] = removing) -> None:
            if job_id in stuck:
                raise PermissionError(13, "Permission denied")
            removing(job_id)

        monkeypatch.setattr(studio.media, name, refuse)
    assert await studio.empty_trash() == 1
    assert [job.id for job in studio.history.trashed()] == [jobs[0].id]
    studio.shelf.quota_bytes = 1
    await studio.shelf.enforce_quota()
    kept, gone = studio.status(jobs[2].id), studio.status(jobs[3].id)
    assert kept["evicted_at"] is None
    assert gone["evicted_at"] is not None


async def test_a_quota_that_the_trash_fills_refuses_nothing(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    jobs = [await ended(studio, await studio.submit(prompt="p", seed=i)) for i in range(2)]
    await studio.star(jobs[0].id)
    studio.shelf.quota_bytes = studio.media.total_bytes()
    await studio.delete(jobs[1].id)
    assert studio.health()["ok"]
    assert (await ended(studio, await studio.submit(prompt="p"))).status is JobStatus.COMPLETED
    assert studio.history.get(jobs[1].id) is None


async def test_health_tells_of_a_full_disk_and_a_full_quota_while_nothing_waits(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert studio.health()["ok"]
    monkeypatch.setattr(studio.media, "free_bytes", lambda: 0)
    await studio.room.look()
    assert "0 MiB free" in studio.health()["reasons"][0]
    monkeypatch.undo()
    await studio.room.look()
    await studio.star(job.id)
    studio.shelf.quota_bytes = 1
    assert studio.health()["reasons"] == ["the quota is full of starred videos"]


async def test_a_job_that_a_slot_died_of_has_the_time_of_a_machine_not_measured(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(step_timeout=60)
    job = await ended(studio, await studio.submit(prompt="p"))
    assert studio._runs._patience(job).step == pytest.approx(20)
    assert studio._runs._patience(replace(job, deaths=["at step 3"])).step == 60
