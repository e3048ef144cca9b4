"""The trash: what every call says of a job that is in it, and when it is emptied."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mochi_app.callers import Caller
from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict, NotFound
from mochi_app.studio.studio import Studio
from tests.conftest import eventually

MakeStudio = Callable[..., Awaitable[Studio]]


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
