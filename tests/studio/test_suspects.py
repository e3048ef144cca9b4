"""Jobs that the server died with: counted, run alone, held, tried again. Only the model is faked,
and the server that dies is a process that holds the history, and is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mochi_app.callers import Caller
from mochi_app.files import PROJECT_DIR
from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict, NotYours, RequestError
from mochi_app.store.backups import make_backup
from mochi_app.store.checks import Sentinel
from mochi_app.store.restore import restore
from mochi_app.studio.scheduling import next_job, places
from mochi_app.studio.studio import Studio
from mochi_app.studio.suspects import HELD_DEATHS, outlived, released
from mochi_app.web.events import EventFeed, Wanted
from tests.conftest import close_studio, eventually
from tests.plain_jobs import job as plain
from tests.plain_jobs import one_second_a_step
from tests.studios import samples

MakeStudio = Callable[..., Awaitable[Studio]]


async def died_with(studio: Studio, *jobs: Job, told_to_end: bool = False) -> None:
    """End the studio, and have a server that ran these jobs be killed on its data folder."""
    await close_studio(studio)
    words = ["end"] if told_to_end else ["go on"]
    arguments = [str(studio.settings.data_dir), *words, *(job.id for job in jobs)]
    program = [sys.executable, "-m", "tests.dying", *arguments]
    killed = await asyncio.to_thread(subprocess.run, program, cwd=PROJECT_DIR, check=False)
    assert killed.returncode == -signal.SIGKILL


async def held(make_studio: MakeStudio, owner: str = "ann", **settings: object) -> Studio:
    """A studio in which a job of this owner is held, the only one there is."""
    studio = await make_studio(turns=False, **settings)
    job = await studio.submit(prompt="p", request_id="bad", owner=owner)
    for number in range(HELD_DEATHS):
        assert studio.history.get(job.id) is not None
        await died_with(studio, job)
        studio = await make_studio(turns=number == HELD_DEATHS - 1, **settings)
    return studio


def only(studio: Studio) -> Job:
    """The only job."""
    found = studio.list_jobs()["jobs"]
    assert len(found) == 1
    return studio.find(found[0]["id"])


async def test_three_deaths_of_the_server_hold_a_job(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    for deaths in (1, 2):
        await died_with(studio, job)
        studio = await make_studio(turns=False)
        found = studio.find(job.id)
        assert (found.status, found.server_deaths, found.held) == ("PENDING", deaths, None)
        assert (found.suspect, found.attempts) == (True, 0)
        assert [one.id for one in studio.dispatch.waiting] == [job.id]
    await died_with(studio, job)
    studio = await make_studio()
    found = studio.find(job.id)
    assert (found.status, found.server_deaths) == (JobStatus.PENDING, 3)
    assert found.held is not None
    assert found.held.startswith("the server ended 3 times while this job ran")


async def first_event(studio: Studio, job_id: str) -> dict[str, Any]:
    """What a page that names the job hears first."""
    feed, wanted = EventFeed(studio), Wanted((job_id,))
    with feed.naming(wanted):
        async for event in feed.stream(wanted):
            told: dict[str, Any] = json.loads(event.removeprefix(b"data: "))
            return told
    raise AssertionError("the stream ended")


async def test_a_held_job_takes_no_turn_and_no_place(make_studio: MakeStudio) -> None:
    studio = await held(make_studio, max_pending=1)
    job = only(studio)
    await eventually(lambda: studio.pool.ready_slot() is not None, "a slot")
    assert (studio.dispatch.waiting, studio.dispatch.tickets_needed, studio.dispatch.starving) == (
        [],
        0,
        False,
    )
    assert studio.health()["ok"]
    view = studio.status(job.id)
    assert (view["position"], view["eta_seconds"], view["waits_for"]) == (None, None, None)
    told = samples(studio)
    assert (told["mochi_jobs_held{}"], told["mochi_queue_length{}"]) == (1, 0)
    assert told["mochi_jobs{status=pending}"] == 1
    event = await first_event(studio, job.id)
    assert (event["held"], event["pending"]) == (1, 0)
    assert [one["held"] for one in event["jobs"]] == [job.held]
    for listed in ({"status": "PENDING"}, {"held": True}):
        assert studio.list_jobs(**listed)["total"] == 1
    assert studio.list_jobs(status="PENDING", held=False)["total"] == 0
    other = await studio.submit(prompt="p")  # though one job is the most that may wait
    await eventually(lambda: studio.find(other.id).status is JobStatus.COMPLETED, "the video")
    assert studio.find(job.id) == job


async def test_what_else_is_asked_of_a_held_job(make_studio: MakeStudio) -> None:
    studio = await held(make_studio)
    job = only(studio)
    assert await studio.submit(prompt="p", request_id="bad", owner="ann") == job
    with pytest.raises(Conflict, match="is PENDING and held: the server ended 3 times"):
        await studio.enhance(job.id)
    with pytest.raises(Conflict, match="cancel it before deleting it"):
        await studio.delete(job.id)
    assert (await studio.star(job.id)).held == job.held
    cancelled = await studio.cancel(job.id, by=Caller("ann"))
    assert (cancelled.status, cancelled.held) == (JobStatus.CANCELLED, None)
    assert samples(studio)["mochi_jobs_held{}"] == 0
    await studio.delete(job.id, by=Caller("ann"))
    await studio.empty_trash()
    assert len(studio.history) == 0


async def test_a_held_enhance_is_the_answer_to_another(make_studio: MakeStudio) -> None:
    studio = await make_studio(enhance_steps=16)
    preview = await studio.submit(prompt="p")
    await eventually(lambda: studio.find(preview.id).status is JobStatus.COMPLETED, "the preview")
    await close_studio(studio)
    studio = await make_studio(turns=False, enhance_steps=16)
    enhance = await studio.enhance(preview.id)
    for _ in range(HELD_DEATHS):
        await died_with(studio, enhance)
        studio = await make_studio(turns=False, enhance_steps=16)
    again = await studio.enhance(preview.id)
    assert again.id == enhance.id
    assert again.held


async def test_only_owner_and_admin_try_a_held_job_again(make_studio: MakeStudio) -> None:
    studio = await held(make_studio)
    job = only(studio)
    with pytest.raises(NotYours, match="only ann or an admin can retry it"):
        await studio.retry(job.id, by=Caller("bob"))
    assert studio.find(job.id).held
    again = await studio.retry(job.id, by=Caller("ada", admin=True))
    assert (again.id, again.held, again.server_deaths, again.suspect) == (job.id, None, 0, True)
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    done = studio.find(job.id)
    assert (done.server_deaths, done.suspect, done.held, done.error) == (0, False, None, None)
    with pytest.raises(Conflict, match="is COMPLETED: expected one that is held, or has failed"):
        await studio.retry(job.id, by=Caller("ann"))


async def test_what_waits_or_runs_is_not_tried_again(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    with pytest.raises(Conflict, match="is PENDING: expected one that is held"):
        await studio.retry(job.id)
    cancelled = await studio.cancel(job.id)
    again = await studio.retry(cancelled.id, by=Caller("bob"))
    assert (again.id != job.id, again.owner, again.seed) == (True, "bob", job.seed)


async def test_suspects_run_one_at_a_time_and_nothing_beside_them(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False, slots="cpu;cpu")
    first, second, innocent = [
        await studio.submit(prompt="slow", num_inference_steps=10) for _ in range(3)
    ]
    await died_with(studio, first, second)
    studio = await make_studio(turns=False, slots="cpu;cpu")
    assert [job.server_deaths for job in studio.dispatch.waiting] == [1, 1, 0]
    await eventually(lambda: studio.pool.ready_or_busy == 2)
    turns = [asyncio.create_task(studio.dispatch.engine_turn()) for _ in range(3)]
    seen = set()

    def running() -> tuple[str, ...]:
        return tuple(job.id for job in studio.history.with_status(JobStatus.PROCESSING))

    while not all(turn.done() for turn in turns):
        seen.add(running())
        assert not studio.dispatch.starving or len(running()) == 0
        await asyncio.sleep(0.005)
    assert seen - {()} == {(first.id,), (second.id,), (innocent.id,)}
    assert studio.history.count(JobStatus.COMPLETED) == 3
    assert not any(job["suspect"] for job in studio.list_jobs()["jobs"])


async def test_a_death_that_many_share_holds_nobody(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    jobs = [await studio.submit(prompt="p") for _ in range(2)]
    for _ in range(HELD_DEATHS + 1):  # which cannot be, as suspects run alone
        await died_with(studio, *jobs)
        studio = await make_studio(turns=False)
    found = [studio.find(job.id) for job in jobs]
    assert [(job.server_deaths, job.held) for job in found] == [(1, None), (1, None)]


async def test_a_new_checkpoint_begins_the_count_anew(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    counts = []
    for number in range(5):
        if number in (0, 2):
            path = studio.media.checkpoint(job.id)
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.utime(path, (number + 1, number + 1))
        await died_with(studio, job)
        studio = await make_studio(turns=False)
        counts.append(studio.find(job.id).server_deaths)
    assert counts == [1, 2, 1, 2, 3]
    assert studio.find(job.id).held
    assert studio.media.checkpoint(job.id).exists()


async def test_a_planned_end_counts_for_nothing(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    for _ in range(HELD_DEATHS):
        await died_with(studio, job, told_to_end=True)
        studio = await make_studio(turns=False)
        found = studio.find(job.id)
        assert (found.status, found.server_deaths, found.suspect) == ("PENDING", 0, False)


async def test_a_video_that_was_in_place_clears_the_count(make_studio: MakeStudio) -> None:
    studio = await held(make_studio)
    job = only(studio)
    await close_studio(studio)
    (studio.media.videos / f"{job.id}.mp4").write_bytes(b"made after all")
    studio = await make_studio(turns=False)
    found = studio.find(job.id)
    assert (found.status, found.server_deaths, found.held) == (JobStatus.COMPLETED, 0, None)


async def test_a_restore_neither_loses_nor_invents_deaths(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job, other = [await studio.submit(prompt="p") for _ in range(2)]
    await died_with(studio, job)
    studio = await make_studio(turns=False)
    await died_with(studio, job)
    studio = await make_studio(turns=False)
    await studio.history.update(other.id, lambda job: job.moved(JobStatus.PROCESSING))
    backup = await asyncio.to_thread(make_backup, studio.settings.data_dir)
    await died_with(studio, job)
    await asyncio.to_thread(restore, studio.settings.data_dir, backup.path)
    studio = await make_studio(turns=False)
    found = [studio.find(one.id) for one in (job, other)]
    assert [(one.status, one.server_deaths) for one in found] == [("PENDING", 2), ("PENDING", 0)]


async def test_a_run_that_could_not_be_written_down_is_no_death(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await died_with(studio, job)
    studio = await make_studio(turns=False)
    await studio.history.update(job.id, lambda job: job.moved(JobStatus.PROCESSING))
    await studio._recovery.repair()
    assert studio.find(job.id).server_deaths == 1


async def test_an_earlier_version_leaves_no_death_behind(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="p")
    await died_with(studio, job)
    path = studio.settings.data_dir / "history" / "store.json"
    said = Sentinel.read(path.parent)
    assert said is not None
    assert said.serving
    earlier = said.content().replace(b',"serving":true', b"")
    path.write_bytes(earlier)
    studio = await make_studio(turns=False)
    assert studio.find(job.id).server_deaths == 0


async def test_deaths_of_slots_are_counted_beside_those_of_the_server(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="kill")
    for _ in range(2):
        await died_with(studio, job)
        studio = await make_studio(turns=False)
    await close_studio(studio)
    studio = await make_studio()
    await eventually(lambda: studio.find(job.id).status.terminal, "its end")
    found = studio.find(job.id)
    assert (found.status, found.server_deaths, len(found.deaths)) == ("FAILED", 2, 1)
    assert (found.error or "").startswith("poison: 2 slots died of it")


async def test_the_backlog_is_full_of_jobs_that_wait_not_of_held_ones(
    make_studio: MakeStudio,
) -> None:
    studio = await held(make_studio, max_pending=2)
    await close_studio(studio)
    studio = await make_studio(turns=False, max_pending=2)
    for _ in range(2):
        await studio.submit(prompt="p")
    with pytest.raises(RequestError, match="2 jobs are waiting, the most"):
        await studio.submit(prompt="p")


def suspect(name: str, at: float = 0.0) -> Job:
    return replace(plain(name, at=at), suspect=True, started_processing_at=1.0)


def test_a_suspect_that_is_next_lets_nothing_pass() -> None:
    jobs = [plain("a", at=1), suspect("b", at=2)]
    chosen = next_job(jobs, one_second_a_step)
    assert chosen is not None
    assert chosen.id == "b"
    assert next_job(jobs, one_second_a_step, [plain("runs")]) is None
    assert next_job(jobs[:1], one_second_a_step, [suspect("runs")]) is None


def test_places_behind_a_suspect_wait_for_its_end() -> None:
    jobs = [plain("a", at=1), plain("c", at=2), suspect("b", at=3)]
    found = places(jobs, [4.0, 0.0], one_second_a_step)
    assert [found[name].eta_seconds for name in "bac"] == [12.0, 20.0, 20.0]


def test_only_a_held_job_is_released() -> None:
    job = replace(plain("a"), status=JobStatus.PENDING)
    for _ in range(HELD_DEATHS):
        assert job.held is None
        with pytest.raises(Conflict):
            released(job)
        job = outlived(job, 0.0, alone=True)
    assert released(job).held is None
