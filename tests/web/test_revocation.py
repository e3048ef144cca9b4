"""An answer goes on no longer than its caller is let in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mochi_app.web import revocation as stay
from tests.conftest import eventually


class Answer:
    """What one caller is answered, who is let in until `out` is set."""

    def __init__(self, app: ASGIApp, path: str = "/events") -> None:
        self.messages: list[Message] = []
        self.out = False
        scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        self.task = asyncio.create_task(
            stay.while_let_in(lambda: not self.out, app, scope, self._receive, self._send)
        )

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("the caller never goes by itself")

    async def _send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def whole(self) -> bool:
        """Whether the last message ends the body."""
        last = self.messages[-1]
        return last["type"] == "http.response.body" and not last.get("more_body", False)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stay, "CHECK_SECONDS", 0.01)


class Endless:
    """An app whose answer has no end; `left` once it was told to end."""

    def __init__(self, **headers: str) -> None:
        self.left = False
        self._headers = headers

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)
        finally:
            self.left = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(self._events(), headers=self._headers)(scope, receive, send)


async def test_a_stream_ends_when_its_caller_is_let_in_no_more() -> None:
    app = Endless()
    answer = Answer(app)
    await eventually(lambda: len(answer.body) > 50, "a stream that goes on")
    assert not app.left
    answer.out = True
    assert await asyncio.wait_for(answer.task, 10) is True
    assert app.left
    assert answer.whole


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/events", b""),
        ("/gradio_api/heartbeat/page", b""),
        ("/gradio_api/queue/data", b'data: {"msg":"unexpected_error",'),
        ("/gradio_api/call/generate/1", b'event: error\ndata: "the login ended'),
    ],
)
async def test_the_last_words_are_ours(path: str, told: bytes) -> None:
    async def confesses(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            text = f"cancelled at {__file__}: {error}".encode()
            await send({"type": "http.response.body", "body": text, "more_body": True})
            raise

    answer = Answer(confesses, path)
    answer.out = True
    assert await asyncio.wait_for(answer.task, 10) is True
    assert answer.whole
    assert answer.body.startswith(told)
    assert b"cancelled at" not in answer.body


async def test_a_body_of_told_length_is_cut_off_and_not_called_whole() -> None:
    answer = Answer(Endless(**{"content-length": "1000000"}))
    await eventually(lambda: answer.body, "a beginning")
    answer.out = True
    assert await asyncio.wait_for(answer.task, 10) is True
    assert not answer.whole


async def test_what_has_not_begun_is_left_to_be_refused() -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    answer = Answer(waits)
    answer.out = True
    assert await asyncio.wait_for(answer.task, 10) is False
    assert answer.messages == []


async def test_an_answer_that_ends_by_itself_is_left_alone() -> None:
    answer = Answer(PlainTextResponse("all of it"))
    assert await asyncio.wait_for(answer.task, 10) is True
    assert (answer.body, answer.whole) == (b"all of it", True)


@pytest.mark.parametrize("error", [TimeoutError("the app's own"), ValueError("a fault")])
async def test_an_apps_own_error_stays_its_own(error: Exception) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await asyncio.wait_for(Answer(fails).task, 10)
