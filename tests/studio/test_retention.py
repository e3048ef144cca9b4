"""The trash: what every call says of a job that is in it, and when it is emptied."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mochi_app.callers import Caller
from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict, NotFound, RequestError
from mochi_app.studio.disk_space import video_bytes
from mochi_app.studio.studio import Studio
from tests.clocks import DAY, Clock
from tests.conftest import DEADLINE, close_studio, eventually
from tests.studios import ACTIVE, MakeStudio, ended


async def made(studio: Studio, **parameters: Any) -> Job:
    """A job that has completed."""
    job = await studio.submit(**({"prompt": "p"} | parameters))
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    return studio.find(job.id)


async def test_a_request_that_made_a_trashed_job_is_told_so_and_how_to_restore_it(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    asked: dict[str, Any] = {"prompt": "p", "request_id": "mine", "owner": "ann"}
    job = await made(studio, **asked)
    await studio.delete(job.id)
    with pytest.raises(Conflict) as refusal:
        await studio.submit(**asked)
    told = str(refusal.value)
    assert told.startswith("request_id: 'mine'")
    for part in (job.id, "in the trash", "restore_job"):
        assert part in told
    with pytest.raises(Conflict, match="another prompt"):
        await studio.submit(**asked | {"prompt": "q"})
    assert len(studio.history) == 1
    await studio.restore(job.id, by=Caller("ann"))
    assert (await studio.submit(**asked)).id == job.id


async def test_another_owner_may_use_the_request_id_of_a_trashed_job(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    job = await made(studio, request_id="mine", owner="ann")
    await studio.delete(job.id)
    other = await studio.submit(prompt="p", request_id="mine", owner="bob")
    assert other.id != job.id


async def test_a_purged_job_frees_its_request_id(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await made(studio, request_id="mine")
    await studio.delete(job.id)
    await studio.empty_trash()
    again = await studio.submit(prompt="p", request_id="mine")
    assert again.id != job.id
    with pytest.raises(NotFound, match="no job has the id"):
        studio.status(job.id)


@pytest.mark.parametrize(
    "name", ["status", "lineage", "enhance", "cancel", "star", "delete", "retry", "watch"]
)
async def test_every_call_says_that_a_job_is_in_the_trash(
    make_studio: MakeStudio, name: str
) -> None:
    studio = await make_studio()
    job = await made(studio)
    await studio.delete(job.id)

    async def ask() -> None:
        answer = getattr(studio, name)(job.id)
        await (anext(answer) if name == "watch" else answer)

    with pytest.raises(NotFound) as refusal:
        await ask()
    assert str(refusal.value) == (
        f"job_id: job {job.id} is in the trash: restore_job takes it out of it, until the trash is"
        " emptied"
    )
    assert studio.history.trashed() == [studio.history.get(job.id)]


async def test_an_enhance_of_a_restored_preview_and_beside_a_trashed_enhance(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(enhance_steps=16)
    preview = await made(studio)
    first = await studio.enhance(preview.id)
    await eventually(lambda: studio.find(first.id).status.terminal, "the enhance")
    await studio.delete(first.id)
    assert studio.lineage(preview.id)["enhance"] is None
    second = await studio.enhance(preview.id)
    assert second.id != first.id
    await eventually(lambda: studio.find(second.id).status.terminal, "the second enhance")
    await studio.delete(preview.id)
    assert studio.lineage(second.id)["preview"] is None
    await studio.restore(preview.id)
    lineage = studio.lineage(second.id)
    assert lineage["preview"] is not None
    assert lineage["preview"]["id"] == preview.id


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
    assert await studio.retention.empty_trash(older_than_hours=1) == 0
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
    studio.retention.quota_bytes = two
    await studio.retention.enforce_quota()
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
    studio.retention.quota_bytes = video_bytes(job)
    after = await ended(studio, await studio.submit(prompt="p", seed=1))
    assert after.status is JobStatus.COMPLETED
    assert studio.pool.slots[0].slot.pids == pids


async def test_a_quota_full_of_stars_refuses_new_jobs(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    await studio.star(job.id)
    studio.retention.quota_bytes = video_bytes(job)
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
    studio.retention.quota_bytes = studio.media.total_bytes()
    with pytest.raises(RequestError, match="starred"):
        await studio.submit(prompt="p")
    assert studio.status(small.id)["evicted_at"] is None


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
    studio.retention.quota_bytes = 1
    await studio.retention.enforce_quota()
    kept, gone = studio.status(jobs[2].id), studio.status(jobs[3].id)
    assert kept["evicted_at"] is None
    assert gone["evicted_at"] is not None


async def test_a_quota_that_the_trash_fills_refuses_nothing(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    jobs = [await ended(studio, await studio.submit(prompt="p", seed=i)) for i in range(2)]
    await studio.star(jobs[0].id)
    studio.retention.quota_bytes = studio.media.total_bytes()
    await studio.delete(jobs[1].id)
    assert studio.health()["ok"]
    assert (await ended(studio, await studio.submit(prompt="p"))).status is JobStatus.COMPLETED
    assert studio.history.get(jobs[1].id) is None


async def test_the_trash_outlives_a_clock_that_is_set_forward_and_back(
    make_studio: MakeStudio, clock: Clock
) -> None:
    studio = await make_studio()
    before = await made(studio)
    await studio.delete(before.id)
    clock.ahead = DAY
    assert await studio.retention.empty_trash(older_than_hours=24) == 0
    meanwhile = await made(studio)
    await studio.delete(meanwhile.id)
    clock.ahead = 0
    assert await studio.retention.empty_trash(older_than_hours=24) == 0
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
        assert await studio.retention.empty_trash(older_than_hours=24) == 0
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
        assert await studio.retention.empty_trash(older_than_hours=24) == 0
        await close_studio(studio)
        studio = await make_studio()
    assert studio.history.uptime >= 23 * 3600
    studio.history._store._clock = lambda: time.monotonic() + 3700
    await studio.retention.empty_trash(older_than_hours=24)  # unless the janitor was first
    assert studio.history.get(job.id) is None


async def test_what_an_earlier_version_put_into_the_trash_begins_to_count_now(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    job = await made(studio)
    await studio.delete(job.id)
    await studio.history.update(job.id, lambda job: replace(job, deleted_uptime=None))
    await studio.history.update(job.id, lambda job: replace(job, deleted_at=1.0))
    assert await studio.retention.empty_trash(older_than_hours=1) == 0
    studio.history._store._clock = lambda: time.monotonic() + 3700
    assert await studio.retention.empty_trash(older_than_hours=1) == 1
