"""A finished video that cannot be put into place: what waits, and what is given up."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mochi_app.jobs import JobStatus
from mochi_app.store.media import MediaStore
from mochi_app.studio import filing
from mochi_app.studio.studio import Studio
from tests.conftest import eventually
from tests.studios import ended

MakeStudio = Callable[..., Awaitable[Studio]]


class Refusing:
    """A disk that refuses finished videos with `error` while there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self.tries = 0
        finalise = MediaStore.finalise

        def refusing(store: MediaStore, *arguments: Any) -> tuple[str, str]:
            self.tries += 1
            if self.error is not None:
                raise self.error
            return finalise(store, *arguments)

        monkeypatch.setattr(MediaStore, "finalise", refusing)
        monkeypatch.setattr(filing, "RETRY_SECONDS", 0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    return Refusing(monkeypatch)


async def test_a_finished_video_waits_and_is_filed_once(
    make_studio: MakeStudio, disk: Refusing
) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="p")
    await eventually(lambda: disk.tries > 3)
    reason = studio.status(job.id)["waits_for"]
    assert reason == "Stale file handle"
    assert any(reason in told for told in studio.health()["reasons"])
    disk.error = None
    done = await ended(studio, job)
    assert (done.status, done.attempts) == (JobStatus.COMPLETED, 1)
    assert studio.health()["ok"]
    assert studio.status(job.id)["waits_for"] is None


async def test_one_file_that_is_refused_for_long_does_not_hold_the_others(
    make_studio: MakeStudio, disk: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filing, "FILING_SECONDS", 0.5)
    studio = await make_studio()
    job = await ended(studio, await studio.submit(prompt="p"))
    assert (job.status, job.error) == (
        JobStatus.FAILED,
        "the video could not be kept: Stale file handle",
    )
    assert disk.tries > 2
    disk.error = None
    assert (await ended(studio, await studio.submit(prompt="p"))).status is JobStatus.COMPLETED


async def test_a_finished_video_that_is_gone_is_made_again(
    make_studio: MakeStudio, disk: Refusing
) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt="p")
    await eventually(lambda: disk.tries)
    for path in (studio.media.data_dir / "scratch" / "0").glob("*"):
        path.unlink()
    disk.error = None
    done = await ended(studio, job)
    assert (done.status, done.attempts) == (JobStatus.COMPLETED, 2)
