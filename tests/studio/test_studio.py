"""The studio over a real history and real processes; only the model is faked."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mochi_app.callers import Caller
from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.request import NotYours, RequestError
from tests.conftest import (
    eventually,
)
from tests.studios import MakeStudio, ended, running


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


async def test_cancel_of_a_waiting_job(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    first = await studio.submit(prompt="slow", num_inference_steps=24)
    waiting = await studio.submit(prompt="p")
    await running(studio, first)
    assert (await studio.cancel(waiting.id)).status is JobStatus.CANCELLED
    assert (await ended(studio, first)).status is JobStatus.COMPLETED
    assert studio.media.video_path(waiting.id) is None


async def test_cancel_of_an_ended_job_changes_nothing(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert await studio.cancel(job.id) == job


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


# Owners
async def test_only_owner_and_admin_stop_delete_and_restore(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    ann, bob, ada = Caller("ann"), Caller("bob"), Caller("ada", admin=True)
    for by in (ann, ada):
        job = await studio.submit(prompt="hers", owner="ann")
        with pytest.raises(NotYours, match=f"job {job.id} is ann's: only ann or an admin can canc"):
            await studio.cancel(job.id, by=bob)
        assert (await studio.cancel(job.id, by=by)).status == "CANCELLED"
        assert (await studio.cancel(job.id, by=bob)).status == "CANCELLED"  # ended: as it is
        with pytest.raises(NotYours, match="can delete it"):
            await studio.delete(job.id, by=bob)
        await studio.delete(job.id, by=by)
        with pytest.raises(NotYours, match="can restore it"):
            await studio.restore(job.id, by=bob)
        assert (await studio.restore(job.id, by=by)).deleted_at is None
        assert (await studio.star(job.id)).starred
    with pytest.raises(NotYours, match="only an admin can empty it"):
        await studio.empty_trash(by=ann)
    await studio.delete(job.id, by=ann)
    assert await studio.empty_trash(by=ada) == 1


async def test_another_browsers_job_is_left_alone_and_nobodys_is_everybodys(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="theirs", owner="anon-1")
    for by in (Caller("anon-2"), Caller()):
        with pytest.raises(NotYours, match="another browser: cancel it there"):
            await studio.cancel(job.id, by=by)
    assert (await studio.cancel(job.id, by=Caller("anon-1"))).status == "CANCELLED"
    job = await studio.submit(prompt="nobody's")
    assert (await studio.cancel(job.id, by=Caller("anon-2"))).status == "CANCELLED"
    await studio.delete(job.id, by=Caller("anon-1"))
    assert await studio.empty_trash(by=Caller("anon-3")) == 1
