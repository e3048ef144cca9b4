"""Room on the disk: what is promised to accepted jobs, and what happens when it runs out."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import RequestError
from mochi_app.store.media import MediaStore
from mochi_app.studio import dispatch as module
from mochi_app.studio import runs
from mochi_app.studio.disk_space import MARGIN, size, video_bytes
from mochi_app.studio.studio import Studio
from tests.conftest import eventually
from tests.studios import MakeStudio, ended, running

EACH = 64 * 64 * 7 // 4  # bytes set aside for a job of these tests


class Disk:
    """How much the disk has free, as far as the app can know."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = MARGIN + 100 * EACH
        monkeypatch.setattr(MediaStore, "free_bytes", lambda _: self.free)
        monkeypatch.setattr(module, "SPACE_SECONDS", 0.02)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_accepted_jobs_do_not_overbook_the_disk(make_studio: MakeStudio, disk: Disk) -> None:
    disk.free = MARGIN + 3 * EACH
    studio = await make_studio(turns=False)
    jobs = [await studio.submit(prompt="p", request_id=f"{number}") for number in range(3)]
    assert [video_bytes(job) for job in jobs] == [EACH] * 3
    with pytest.raises(RequestError, match=r"^the disk has 256 MiB free, .* delete videos or free"):
        await studio.submit(prompt="one too many")
    assert (await studio.submit(prompt="p", request_id="0", seed=jobs[0].seed)).id == jobs[0].id
    await studio.cancel(jobs[1].id)
    await studio.submit(prompt="in its place")


async def test_a_job_waits_for_room_and_says_so(make_studio: MakeStudio, disk: Disk) -> None:
    studio = await make_studio()
    first = await studio.submit(prompt="slow", num_inference_steps=20)
    job = await studio.submit(prompt="p")
    await running(studio, first)
    disk.free = 5 << 20
    await ended(studio, first)
    reason = await eventually(lambda: studio.status(job.id)["waits_for"])
    assert reason == "the disk has 5 MiB free, this video needs 256 MiB"
    health = await eventually(lambda: (told := studio.health())["reasons"] and told)
    assert (health["ok"], health["reasons"]) == (False, [reason])
    assert not studio.dispatch.starving
    disk.free = MARGIN + EACH
    done = await ended(studio, job)
    assert (done.status, done.attempts) == (JobStatus.COMPLETED, 1)
    assert studio.status(job.id)["waits_for"] is None
    assert studio.health()["ok"]


async def test_the_trash_makes_room_before_a_job_waits(make_studio: MakeStudio, disk: Disk) -> None:
    studio = await make_studio()
    old = [await ended(studio, await studio.submit(prompt="old")) for _ in range(2)]
    for job in old:
        await studio.delete(job.id)
    removed: list[str] = []
    remove = studio.media.remove

    def counted(job_id: str) -> None:
        remove(job_id)
        removed.append(job_id)
        disk.free = MARGIN + EACH

    studio.media.remove = counted  # type: ignore[method-assign]
    disk.free = 0
    assert (await ended(studio, await studio.submit(prompt="new"))).status is JobStatus.COMPLETED
    assert removed == [old[0].id], "no more than is needed, the oldest first"


@pytest.mark.parametrize(
    ("times", "status", "error"),
    [
        (1, "COMPLETED", None),
        (2, "FAILED", "the disk was full 2 times: free it and ask again (No space left on device)"),
    ],
)
async def test_a_disk_that_fills_up_costs_a_try_and_no_slot(
    make_studio: MakeStudio,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    status: str,
    error: str | None,
) -> None:
    finalise, tries = MediaStore.finalise, [0]

    def full(store: MediaStore, *arguments: Any) -> tuple[str, str]:
        tries[0] += 1
        if tries[0] <= times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finalise(store, *arguments)

    monkeypatch.setattr(MediaStore, "finalise", full)
    monkeypatch.setattr(runs, "MAX_ATTEMPTS", 2)
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert (job.attempts, job.status, job.error) == (2, status, error)
    assert list_scratch(studio) == []
    assert [slot.restarts for slot in studio.pool.slots] == [0]


def list_scratch(studio: Studio) -> list[Path]:
    """Files of jobs in scratch."""
    return list((studio.media.data_dir / "scratch").rglob("*.mp4"))


async def test_the_quota_makes_room_before_a_video_lands(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    first = await ended(studio, await studio.submit(prompt="p", seed=1))
    each = studio.media.size(first.id)
    studio.retention.quota_bytes = 2 * each + each // 2
    most: list[int] = []
    finalise = MediaStore.finalise

    def watched(store: MediaStore, *arguments: Any) -> tuple[str, str]:
        names = finalise(store, *arguments)
        most.append(store.total_bytes())
        return names

    monkeypatch.setattr(MediaStore, "finalise", watched)
    jobs: list[Job] = [
        await ended(studio, await studio.submit(prompt="p", seed=1)) for _ in range(3)
    ]
    assert max(most) <= studio.retention.quota_bytes
    assert [studio.status(job.id)["video_url"] is not None for job in [first, *jobs]] == [
        *(False, False),
        *(True, True),
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (5 << 20, "5 MiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text


async def test_health_tells_of_a_full_disk_and_a_full_quota_while_nothing_waits(
    make_studio: MakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert studio.health()["ok"]
    monkeypatch.setattr(studio.media, "free_bytes", lambda: 0)
    await studio.disk.measure()
    assert "0 MiB free" in studio.health()["reasons"][0]
    monkeypatch.undo()
    await studio.disk.measure()
    await studio.star(job.id)
    studio.retention.quota_bytes = 1
    assert studio.health()["reasons"] == ["the quota is full of starred videos"]
