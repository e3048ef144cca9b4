"""Tickets against a queue that answers, refuses, drops or raises."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from mochi_app.changes import Changes
from mochi_app.web import tickets
from mochi_app.web.tickets import SECRET_HEADER, Tickets
from tests.conftest import eventually


class Queue:
    """Gradio's two routes, with a gate in place of a turn."""

    def __init__(self) -> None:
        self.posts = 0
        self.trouble = ""
        self.gate = asyncio.Event()
        self.app = FastAPI()
        self.app.post("/gradio_api/call/engine_turn")(self.post)
        self.app.get("/gradio_api/call/engine_turn/{event}")(self.read)

    async def post(self, request: Request) -> Response:
        self.posts += 1
        assert request.headers[SECRET_HEADER] == "secret"
        if self.trouble == "refuses":
            return Response("Queue is stopped.", 503)
        if self.trouble == "raises":
            raise KeyError("a session that was evicted")
        return Response('{"event_id": "e"}', media_type="application/json")

    async def read(self, event: str) -> PlainTextResponse:
        await self.gate.wait()
        kind = "error" if self.trouble == "drops" else "complete"
        return PlainTextResponse(f"event: {kind}\ndata: [null]\n\n")


async def started(queue: Queue, needed: list[int]) -> tuple[Tickets, Changes]:
    changed = Changes()
    posting = Tickets(queue.app, "secret", lambda: needed[0], changed)
    posting.start()
    return posting, changed


async def test_as_many_as_needed_and_no_more() -> None:
    queue, needed = Queue(), [2]
    posting, changed = await started(queue, needed)
    await eventually(lambda: queue.posts == 2)
    needed[0] = 3
    changed.beat()
    await eventually(lambda: queue.posts == 3)
    needed[0] = 0
    queue.gate.set()
    await eventually(lambda: not posting._live)
    assert queue.posts == 3
    await posting.stop()


@pytest.mark.parametrize("trouble", ["refuses", "drops", "raises"])
async def test_a_lost_ticket_is_replaced_after_a_pause(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "RETRY_SECONDS", 0.1)
    queue, needed = Queue(), [1]
    queue.gate.set()
    queue.trouble = trouble
    posting, _ = await started(queue, needed)
    await eventually(lambda: queue.posts == 3)
    assert posting.last_error is not None
    needed[0] = 0
    await eventually(lambda: not posting._live)
    assert queue.posts <= 4  # and not thousands
    await posting.stop()


@pytest.mark.parametrize("asked", ["needed", "starving"])
async def test_a_question_that_fails_ends_nothing(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("RETRY_SECONDS", "WATCH_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(tickets, pause, 0.02)
    queue, failed = Queue(), set[str]()
    stalls: list[str] = []

    def answer(question: str, value: int) -> int:
        if question == asked and asked not in failed:
            failed.add(asked)
            raise KeyError("a job that was removed")
        return value

    posting = Tickets(
        queue.app, "secret", lambda: answer("needed", 1), Changes(),
        starving=lambda: bool(answer("starving", 1)), on_stall=stalls.append,
    )  # fmt: skip
    posting.start()
    await eventually(lambda: queue.posts and stalls and failed)
    await posting.stop()


async def test_tickets_that_nobody_grants_are_posted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(tickets, "STALL_SECONDS", 0.1)
    queue, starving = Queue(), [True]
    reasons: list[str] = []
    posting = Tickets(
        queue.app,
        "secret",
        lambda: 1,
        Changes(),
        starving=lambda: starving[0],
        on_stall=reasons.append,
    )
    posting.start()
    await eventually(lambda: queue.posts == 3)
    assert posting.problem == "no ticket was granted for 0.1 s"
    assert set(reasons) == {posting.problem}
    assert len(posting._live) <= 1
    starving[0] = False
    await eventually(lambda: posting.problem is None)
    await posting.stop()


async def test_a_ticket_is_posted_anew_where_not_one_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tickets, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(tickets, "STALL_SECONDS", 0.1)
    queue, needed = Queue(), [0]
    posting = Tickets(
        queue.app, "secret", lambda: needed[0], Changes(), starving=lambda: needed[0] > queue.posts
    )
    posting.start()
    await asyncio.sleep(0)
    needed[0] = 1  # and nobody says so
    await eventually(lambda: queue.posts == 1)
    await posting.stop()


async def test_a_short_wait_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(tickets, "STALL_SECONDS", 1000)
    queue, looks = Queue(), [0]
    reasons: list[str] = []

    def starving() -> bool:
        looks[0] += 1
        return True

    posting = Tickets(
        queue.app, "secret", lambda: 1, Changes(), starving=starving, on_stall=reasons.append
    )
    posting.start()
    await eventually(lambda: looks[0] > 20 and queue.posts)
    assert (queue.posts, reasons, posting.problem) == (1, [], None)
    await posting.stop()
