"""How jobs are accepted: submits, enhances, the backlog, and requests that are repeated."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import Conflict, NotFound, RequestError
from tests.conftest import eventually
from tests.studios import MakeStudio, ended, running


async def test_drawn_seeds_differ(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    jobs = [await studio.submit(prompt="p") for _ in range(8)]
    assert len({job.seed for job in jobs}) == 8


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
    studio = await make_studio(enhance_steps=400)
    preview = await ended(studio, await studio.submit(prompt="slow"))
    first = await studio.enhance(preview.id)
    assert (await studio.enhance(preview.id)).id == first.id
    await running(studio, first)
    await studio.cancel(first.id)
    assert (await ended(studio, first)).status is JobStatus.CANCELLED
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


async def test_request_id_makes_a_submit_repeatable(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    first = await studio.submit(prompt="p", request_id="mine")
    again = await studio.submit(prompt="p", request_id="mine")
    assert again.id == first.id
    assert again.seed == first.seed
    with pytest.raises(Conflict, match="prompt"):
        await studio.submit(prompt="another", request_id="mine")
    assert len(studio.history) == 1


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
