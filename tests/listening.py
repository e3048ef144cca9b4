"""A page's stream of `/events`: what it names, what it has heard, and how many bytes that took."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


def address(jobs: Sequence[str] | None = None, pictures: Sequence[str] = (), **more: str) -> str:
    """The path of a stream that names these jobs."""
    query = dict(more)
    if jobs is not None:
        query["jobs"] = ",".join(jobs)
    if pictures:
        query["pictures"] = ",".join(pictures)
    return "/events" + ("?" + "&".join(f"{name}={value}" for name, value in query.items()))


@dataclass
class Heard:
    """What one page knows from its stream, put together as `page/state.js` does."""

    head: dict[str, Any] = field(default_factory=dict)  # the newest event
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    statuses: dict[str, list[str]] = field(default_factory=dict)  # each change, in order
    steps: dict[str, int] = field(default_factory=dict)  # how many were told, by job
    pictures: dict[str, int] = field(default_factory=dict)  # how many, by job
    retry: float = 1.0  # seconds
    events: int = 0
    bytes: int = 0

    def status(self, job_id: str) -> str:
        """The newest status of a job; nothing before it is told."""
        return self.statuses.get(job_id, [""])[-1]

    def take(self, line: str) -> None:
        """Take in one line of the stream."""
        self.bytes += len(line.encode()) + 1
        if line.startswith("retry: "):
            self.retry = int(line[7:]) / 1000
        if not line.startswith("data: "):
            return
        self.events += 1
        self.head = json.loads(line[6:])
        for job in self.head["jobs"]:
            known = self.jobs.setdefault(job["id"], {})
            if job.get("step", 0) != known.get("step", 0):
                self.steps[job["id"]] = self.steps.get(job["id"], 0) + 1
            known |= job
            told = self.statuses.setdefault(job["id"], [])
            status = known.get("status", "gone")
            if told[-1:] != [status]:
                told.append(status)
        for job_id in self.head.get("pictures", ()):
            self.pictures[job_id] = self.pictures.get(job_id, 0) + 1

    async def follow(self, url: str, path: str) -> None:
        """Listen without end, again when the server ends the stream and says when to come back."""
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while True:
                async with client.stream("GET", path) as stream:
                    stream.raise_for_status()
                    async for line in stream.aiter_lines():
                        self.take(line)
                await asyncio.sleep(self.retry)


@asynccontextmanager
async def listening(heard: Heard, url: str, path: str) -> AsyncIterator[None]:
    """Have a page listen meanwhile."""
    task = asyncio.create_task(heard.follow(url, path))
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
