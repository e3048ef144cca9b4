"""Revocation: an open response ends when its caller loses access.

An event stream does not end by itself, but a login can: by a logout, by the removal of its account,
by a new password, or by expiry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import orjson
from gradio.server_messages import UnexpectedErrorMessage
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

DETAIL = "the login ended: log in again"
CHECK_SECONDS = 5.0  # between two checks whether the caller of an open response still has access


async def while_let_in(
    let_in: Callable[[], bool], app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> bool:
    """Answer a request that changes nothing, and cut the response off once `let_in()` is false.

    A stream then ends normally, Gradio's with an error that its clients raise. A body with a
    Content-Length is truncated: the server closes its connection. Returns whether a response was
    started; if not, the caller must send one.
    """
    begun = whole = counted = False

    async def sending(message: Message) -> None:
        nonlocal begun, whole, counted
        if stay.expired():
            return  # Gradio reports its cancelled task
        if message["type"] == "http.response.start":
            begun, counted = True, "content-length" in Headers(raw=message["headers"])
        elif message["type"] == "http.response.body":
            whole = not message.get("more_body", False)
        await send(message)

    async def watch() -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if not let_in():
                stay.reschedule(asyncio.get_running_loop().time())
                return

    try:
        async with asyncio.timeout(None) as stay:
            watching = asyncio.create_task(watch())
            try:
                await app(scope, receive, sending)
            finally:
                watching.cancel()
    except TimeoutError:
        if not stay.expired():
            raise
    if not stay.expired():
        return True
    log.info("%s is cut off: its login ended", scope["path"])
    if begun and not whole and not counted:
        last = last_words(scope["path"])
        await send({"type": "http.response.body", "body": last, "more_body": False})
    return begun


def last_words(path: str) -> bytes:
    """The error at the end of a stream of Gradio's queue, in the form that its readers expect."""
    if path.startswith("/gradio_api/queue/data"):
        message = UnexpectedErrorMessage(message=DETAIL)
        return b"data: " + orjson.dumps(message.model_dump()) + b"\n\n"
    if path.startswith("/gradio_api/call/"):
        return b"event: error\ndata: " + orjson.dumps(DETAIL) + b"\n\n"
    return b""
