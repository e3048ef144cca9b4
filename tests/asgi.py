"""Apps asked in process, without a socket."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send


# Guards
async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body."""
    body = b""
    if scope["method"] == "POST":
        body = (await receive())["body"]
    await PlainTextResponse(body)(scope, receive, send)


def asking(guard: Any, host: str = "http://mochi.example") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url=host)


# The whole app, in process
Web = Callable[..., Awaitable[SimpleNamespace]]


async def call(client: httpx.AsyncClient, name: str, **parameters: Any) -> Any:
    """One call; the answer, or the error's text."""
    base = "/gradio_api/call"
    posted = await client.post(f"{base}/v2/{name}", json=parameters)
    posted.raise_for_status()
    stream = await client.get(f"{base}/{name}/{posted.json()['event_id']}")
    event, data = stream.text.strip().split("\n\n")[-1].split("\n", 1)
    answer = json.loads(data.removeprefix("data: "))
    return answer[0] if event == "event: complete" else answer["error"]
