"""The live events: what a page is told, how many may listen, and who is sent away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from mochi_app.jobs import Job
from mochi_app.studio.studio import Studio
from mochi_app.web import events, routes
from mochi_app.web.events import EventFeed, Wanted
from tests.conftest import eventually
from tests.listening import Heard

MakeStudio = Callable[..., Awaitable[Studio]]
NOBODY = "00000000000000-0000000000000000"


class Page:
    """A page that opens /events from an address, and what it is answered."""

    def __init__(self, app: FastAPI, query: str = "", address: str = "10.0.0.1") -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self._left = asyncio.Event()
        scope = {"type": "http", "method": "GET", "path": "/events",
                 "query_string": query.encode(), "headers": [], "client": (address, 1)}  # fmt: skip
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.headers |= dict(message.get("headers", ()))
        self.body += message.get("body", b"")

    async def answered(self) -> int:
        """The status, once there is something to read."""
        await eventually(lambda: self.body, "an answer")
        return self.status

    @property
    def heard(self) -> Heard:
        """What it has been told so far, by whole events."""
        heard = Heard()
        for line in self.body.decode().rpartition("\n\n")[0].splitlines():
            heard.take(line)
        return heard

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Every entry of `jobs`, in order."""
        lines = self.body.decode().rpartition("\n\n")[0].splitlines()
        told = [json.loads(line[6:])["jobs"] for line in lines if line.startswith("data: ")]
        return [job for jobs in told for job in jobs]

    @property
    def ended(self) -> bool:
        """Whether the server has ended the stream."""
        return self._task.done()

    async def leave(self) -> None:
        self._left.set()
        await self._task


Opener = Callable[..., Page]


@pytest.fixture
async def studio(make_studio: MakeStudio) -> Studio:
    studio = await make_studio()
    await eventually(lambda: studio.pool.ready_or_busy, "a ready slot")
    return studio


@pytest.fixture
async def open_page(studio: Studio) -> AsyncIterator[Opener]:
    """`open_page(query)`: a page of the app; all leave after the test."""
    app = FastAPI()
    routes.add_routes(app, studio)
    pages: list[Page] = []

    def opened(query: str = "", address: str = "10.0.0.1") -> Page:
        pages.append(Page(app, query, address))
        return pages[-1]

    yield opened
    for page in pages:
        await page.leave()


async def test_no_address_takes_the_live_page_from_the_others(
    open_page: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_STREAMS", 4)
    monkeypatch.setattr(events, "STREAMS_OF_ADDRESS", 2)

    def from_each(*addresses: str) -> list[Page]:
        return [open_page(address=address) for address in addresses]

    at_once = from_each(*["10.0.0.1"] * 9)
    answers = [await page.answered() for page in at_once]
    assert answers == [200, 200, *[429] * 7]
    assert at_once[2].headers[b"retry-after"] == b"10"
    assert b"2 pages of your address listen already" in at_once[2].body
    others = from_each("2001:db8::1", "2001:db8::2", "2001:db8::3")
    assert [await page.answered() for page in others] == [200, 200, 429], "one /64 is one client"
    (late,) = from_each("10.0.0.3")
    assert await late.answered() == 503
    assert late.headers[b"retry-after"] == b"10"
    assert b"4 pages listen already" in late.body
    await at_once[0].leave()
    again = from_each("10.0.0.1", "10.0.0.3")
    assert [await page.answered() for page in again] == [200, 503]
    for page in (at_once[1], again[0]):
        await page.leave()
    again = from_each("10.0.0.3", "10.0.0.1")
    assert [await page.answered() for page in again] == [200, 200]


async def test_a_team_behind_one_address_fits(open_page: Opener) -> None:
    """Fifty people with four pages each; and two such clients leave room for others."""
    team = [open_page() for _ in range(50 * 4)]
    assert {await page.answered() for page in team} == {200}
    for address in ("10.0.0.1", "10.0.0.2"):
        answers = {200}
        while answers == {200}:
            pages = [open_page(address=address) for _ in range(50)]
            answers = {await page.answered() for page in pages}
        assert answers <= {200, 429}
    assert await open_page(address="10.0.0.3").answered() == 200


async def test_a_named_job_is_told_whole_and_then_by_what_changes(
    studio: Studio, open_page: Opener
) -> None:
    job = await studio.submit(prompt="slow pictured", num_inference_steps=30)
    other = await studio.submit(prompt="slow", num_inference_steps=2)
    page = open_page(f"jobs={job.id}&pictures={job.id}")
    await eventually(lambda: page.heard.status(job.id) == "COMPLETED", "the end")
    assert {entry["id"] for entry in page.entries} == {job.id}, f"nothing of {other.id}"
    first, *later = page.entries
    assert first["prompt"] == "slow pictured"
    steps = [entry for entry in later if "prompt" not in entry]
    assert len(steps) > 3
    assert all(entry.keys() == steps[0].keys() for entry in steps), "each is whole"
    assert page.heard.jobs[job.id]["video_url"] == f"/files/{job.id}"
    assert page.heard.pictures[job.id] >= 1
    view = studio.status(job.id)
    assert {name: page.heard.jobs[job.id][name] for name in view} == view


async def test_a_script_that_names_none_hears_of_what_runs(
    studio: Studio, open_page: Opener
) -> None:
    jobs = [await studio.submit(prompt="slow", num_inference_steps=8) for _ in range(3)]
    page = open_page()
    await eventually(lambda: page.heard.status(jobs[2].id) == "COMPLETED", "the end")
    assert all("prompt" not in entry for entry in page.entries)
    told = page.heard.statuses[jobs[2].id]
    assert told[-2:] == ["PROCESSING", "COMPLETED"]
    assert told[:-2] in ([], ["PENDING"])  # claimed, and its record not yet written
    assert all(entry.get("position") is None for entry in page.entries), "none that waits"
    head = page.heard.head
    assert (head["pending"], head["processing"]) == (0, 0)
    slots = [line for line in page.body.decode().splitlines() if '"slots":' in line]
    assert json.loads(slots[0][6:])["slots"][0]["state"] in ("ready", "busy")


async def test_a_change_is_serialised_once_for_all(
    studio: Studio, open_page: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await studio.submit(prompt="x", num_inference_steps=2)
    await eventually(lambda: studio.find(job.id).status.terminal, "its end")
    pages = [open_page(f"jobs={job.id}") for _ in range(30)]
    for page in pages:
        await page.answered()
    views: list[str] = []
    view = studio.view

    def note(job: Job) -> Any:
        views.append(job.id)
        return view(job)

    monkeypatch.setattr(studio, "view", note)
    await studio.star(job.id)
    await eventually(lambda: all(page.heard.jobs[job.id]["starred"] for page in pages), "the star")
    assert views == [job.id]
    assert all(len(page.entries) == 2 for page in pages)


async def test_a_job_that_is_gone_is_told_and_so_is_its_return(
    studio: Studio, open_page: Opener
) -> None:
    job = await studio.submit(prompt="x", num_inference_steps=2)
    await eventually(lambda: studio.find(job.id).status.terminal, "its end")
    page = open_page(f"jobs={job.id},{NOBODY}")
    await page.answered()
    listed = page.heard.head["listed"]
    await studio.delete(job.id)
    await eventually(lambda: len(page.entries) == 3, "its end in the trash")
    assert page.heard.head["listed"] == listed + 1
    await studio.restore(job.id)
    await eventually(lambda: len(page.entries) == 4, "its return")
    assert ["prompt" in entry for entry in page.entries] == [True, False, False, True]
    assert [entry.get("gone", False) for entry in page.entries] == [False, True, True, False]
    assert page.heard.head["listed"] == listed + 2


async def test_a_hidden_page_is_told_once_and_when_to_ask_again(
    studio: Studio, open_page: Opener
) -> None:
    job = await studio.submit(prompt="slow pictured", num_inference_steps=64)
    page = open_page(f"jobs={job.id}&hidden=true")
    await eventually(lambda: page.ended, "the end of the stream")
    assert page.heard.retry == events.HIDDEN_SECONDS
    assert page.heard.events == 1
    assert page.heard.jobs[job.id]["prompt"] == "slow pictured"


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("jobs=../x", "jobs: got '../x', expected at most 64 ids of jobs"),
        ("jobs=" + "%ff" * 3, "expected at most 64 ids of jobs"),
        ("jobs=" + ",".join(f"{n:014x}-{n:016x}" for n in range(65)), "got '65 ids'"),
        (f"pictures={NOBODY}", f"pictures: got '{NOBODY}', expected ids that jobs names, too"),
        (f"jobs={NOBODY}&pictures=<b>", "pictures: got '<b>', expected at most 64 ids"),
    ],
)
async def test_names_that_are_none_are_refused(open_page: Opener, query: str, told: str) -> None:
    page = open_page(query)
    assert await page.answered() == 400
    assert told in json.loads(page.body)["detail"]


async def test_as_many_as_may_be_named_are(open_page: Opener) -> None:
    ids = [f"{n:014x}-{n:016x}" for n in range(64)]
    page = open_page("&".join(f"jobs={job_id}" for job_id in [*ids, *ids]) + "&jobs=")
    assert await page.answered() == 200
    assert [entry["id"] for entry in page.entries] == ids
    nothing = open_page("jobs=")
    assert await nothing.answered() == 200
    assert nothing.entries == []


async def test_a_quiet_stream_says_now_and_then_that_the_server_is_there(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_SECONDS", 0.3)
    feed = EventFeed(studio)
    heard = []
    with feed.naming(wanted := Wanted()):
        async for event in feed.stream(wanted):
            heard.append(event)
            if len(heard) == 3:
                break
    assert b'"jobs":[]' in heard[2]
