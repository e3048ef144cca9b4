"""What a start finds after a crash or a stop, and how it mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mochi_app.jobs import Job, JobStatus
from mochi_app.studio.studio import Studio
from tests.conftest import close_studio
from tests.studios import MakeStudio, checkpoints, ended, running


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


async def test_a_restart_keeps_order_and_runs_interrupted_jobs_again(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    jobs = [await studio.submit(prompt="slow", num_inference_steps=24) for _ in range(3)]
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
    await studio._recovery.repair()
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


async def test_start_mends_what_a_crash_left_between_record_and_file(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    restored, evicted = [
        await ended(studio, await studio.submit(prompt="p", seed=seed)) for seed in range(2)
    ]
    studio.media.move_to_trash(restored.id)
    await studio.history.update(evicted.id, lambda job: replace(job, evicted_at=1.0))
    await close_studio(studio)
    again = await make_studio(turns=False)
    assert again.media.video_path(restored.id) is not None
    assert again.media.video_path(evicted.id) is None
