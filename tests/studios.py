"""What tests of the studio share: waiting for its jobs, and what it leaves on the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client.parser import text_string_to_metric_families

from mochi_app.jobs import Job, JobStatus
from mochi_app.studio.studio import Studio
from tests.conftest import eventually

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


def checkpoints(studio: Studio) -> list[str]:
    return [folder.name for folder in studio.media.checkpoints.iterdir()]


def samples(studio: Studio) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    found = {}
    for family in text_string_to_metric_families(studio.metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found
