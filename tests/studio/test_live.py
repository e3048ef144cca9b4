"""What is news of a job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mochi_app.studio import watching as watching_module
from mochi_app.studio.live import is_news
from mochi_app.studio.scheduling import Speeds
from tests.conftest import eventually
from tests.studios import MakeStudio, ended, running


@pytest.mark.parametrize(
    ("before", "after", "seconds", "news"),
    [
        (100.0, 70.0, 30, False),  # as it was to be
        (100.0, 64.0, 30, False),  # near enough
        (100.0, 60.0, 30, True),  # sooner
        (100.0, 80.0, 30, True),  # later
        (5.0, 0.0, 30, False),  # any moment now
        (5.0, 3.5, 0, False),
        (None, None, 30, False),
        (None, 5.0, 0, True),
        (5.0, None, 0, True),
    ],
)
def test_an_eta_that_runs_down_is_none(
    before: float | None, after: float | None, seconds: float, news: bool
) -> None:
    assert is_news(progress(before), progress(after), seconds) == news


def test_whatever_else_changes_is() -> None:
    assert is_news(progress(100.0), progress(100.0) | {"step": 2}, 0)
    assert is_news(progress(100.0), progress(100.0) | {"held": "why"}, 0)
    assert not is_news(progress(100.0), progress(100.0), 0)


def progress(eta: float | None) -> dict[str, Any]:
    return {"id": "a", "step": 1, "eta_seconds": eta}


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
    monkeypatch.setattr(watching_module, "ETA_PAUSE", 1000)
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
