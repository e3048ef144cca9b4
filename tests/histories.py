"""Histories on a disk, and the jobs in them."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.store.history import History
from tests.places import ROOT

Open = Callable[[], Awaitable[History]]


def job_id(number: int) -> str:
    return f"{number:014x}-{number:016x}"


def make(number: int, prompt: str = "a small red circle", **fields: Any) -> Job:
    values: dict[str, Any] = {
        "id": job_id(number),
        "kind": "preview",
        "prompt": prompt,
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 8,
        "guidance_scale": 4.5,
        "height": 64,
        "width": 64,
        "num_frames": 7,
        "fps": 30,
        "submitted_at": 1.7e9 + number,
        "status": JobStatus.PENDING,
    }
    return Job(**(values | fields))


def completed(number: int, **fields: Any) -> Job:
    return make(number, status=JobStatus.COMPLETED, video=f"{job_id(number)}.mp4", **fields)


def ids(jobs: Any) -> list[int]:
    return [int(job.id[:14], 16) for job in jobs]


def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history" / "cache.db"


@contextlib.contextmanager
def by_hand(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), connection:
        yield connection


async def refused(opened: Open, message: str) -> None:
    with pytest.raises(HistoryError, match=message):
        await opened()


def run_child(program: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


WRITER = """
    import asyncio, sys
    from pathlib import Path
    from dataclasses import replace
    from mochi_app.store.history import History
    from tests.histories import make, job_id

    async def keep_writing(history, first):
        for number in range(first, 10**6, 4):
            await history.add(make(number, request_id=str(number)))
            await history.update(job_id(number), lambda job: replace(job, note="updated"))
            print(number, flush=True)

    async def main():
        history = await History.open(Path(sys.argv[1]))
        print("open", flush=True)
        await asyncio.gather(*(keep_writing(history, first) for first in range(1, 5)))

    asyncio.run(main())
"""


def replaced_by(job: Job, _: Job) -> Job:
    return job


async def keep(data: Path, *jobs: Job) -> None:
    """Write these jobs, new or changed, into the history of `data`, and close it."""
    async with open_history(data) as history:
        for job in jobs:
            if history.get(job.id) is None:
                await history.add(job)
            else:
                await history.update(job.id, partial(replaced_by, job))


@contextlib.asynccontextmanager
async def open_history(data: Path) -> Any:
    history = await History.open(data)
    try:
        yield history
    finally:
        await history.close()


async def kept(data: Path) -> dict[int, Job]:
    """What a server finds: number and job."""
    async with open_history(data) as history:
        return {int(job.id[:14], 16): job for job in history._index}
