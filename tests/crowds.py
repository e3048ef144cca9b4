"""Many clients of one server: what they post, whether they read, and what they are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CONNECTIONS = 16
KEEP_SECONDS = 1.0  # an idle connection; the server's 5 s must not end first
TIMEOUT = 60.0  # seconds
LIST = {"page_size": 1}  # arguments of /list_jobs


@dataclass
class Answers:
    """What a crowd was answered: how often which status, and headers and text of a refusal."""

    codes: Counter[int] = field(default_factory=Counter)
    refusal: tuple[dict[str, str], str] = ({}, "")

    def note(self, response: httpx.Response) -> bool:
        """Count an answer; whether it was a good one."""
        self.codes[response.status_code] += 1
        if response.status_code != 200:
            self.refusal = dict(response.headers), response.text
        return response.status_code == 200


@asynccontextmanager
async def browser(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client with a few connections."""
    limits = httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=KEEP_SECONDS)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        yield client


async def post(
    client: httpx.AsyncClient, name: str, body: dict[str, Any], **headers: str
) -> httpx.Response:
    """Post to an endpoint without reading what it answers."""
    return await client.post(f"/gradio_api/call/v2/{name}", json=body, headers=headers)


async def call(client: httpx.AsyncClient, name: str, body: dict[str, Any], **headers: str) -> str:
    """Post and read: the event stream's text."""
    posted = await post(client, name, body, **headers)
    posted.raise_for_status()
    path = f"/gradio_api/call/{name}/{posted.json()['event_id']}"
    return (await client.get(path)).text


async def flood(
    url: str, count: int, *, read: bool = False, forwarded_for: Callable[[int], str] | None = None
) -> Answers:
    """`count` posts to /list_jobs; their answers are read or left.

    `forwarded_for(number)` names the address that a proxy would name.
    """
    answers = Answers()

    async def one(client: httpx.AsyncClient, number: int) -> None:
        headers = {"x-forwarded-for": forwarded_for(number)} if forwarded_for else {}
        posted = await post(client, "list_jobs", LIST, **headers)
        if answers.note(posted) and read:
            path = f"/gradio_api/call/list_jobs/{posted.json()['event_id']}"
            stream = await client.get(path, headers=headers)
            assert "event: complete" in stream.text, stream.text[:300]

    async with browser(url) as client:
        numbers = iter(range(count))

        async def some() -> None:
            for number in numbers:
                await one(client, number)

        await asyncio.gather(*(some() for _ in range(CONNECTIONS)))
    return answers


async def statuses(
    url: str, job_id: str, until: asyncio.Event, pause: float, *, forwarded_for: str
) -> list[float]:
    """Ask for a job again and again; the seconds of each call."""
    seconds = []
    headers = {"x-forwarded-for": forwarded_for}
    async with browser(url) as client:
        while not until.is_set():
            began = time.perf_counter()
            text = await call(client, "get_job_status", {"job_id": job_id}, **headers)
            assert "event: complete" in text, text[:300]
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(pause)
    return seconds


async def listen(
    url: str, pages: int, callers: int, asked: dict[str, Any], seconds: float
) -> dict[str, int]:
    """Listen for a while with so many pages and callers of /generate; events heard by the one
    of each that heard least."""
    most = 2 * (pages + callers)
    limits = httpx.Limits(max_connections=most, keepalive_expiry=KEEP_SECONDS)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:

        async def count(path: str, news: bytes) -> int:
            heard = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), client.stream("GET", path) as stream:
                    async for piece in stream.aiter_raw():
                        heard += piece.count(news)
            return heard

        async def caller() -> int:
            posted = await post(client, "generate", asked)
            posted.raise_for_status()
            return await count(
                f"/gradio_api/call/generate/{posted.json()['event_id']}", b"event: generating"
            )

        heard = await asyncio.gather(
            *(count("/events", b"data: {") for _ in range(pages)),
            *(caller() for _ in range(callers)),
        )
    return {"page": min(heard[:pages]), "caller": min(heard[pages:])}


def deaf_listener(port: int, path: str, buffer: int = 4096) -> socket.socket:
    """A connection that asks for `path` and does not read the answer, beyond `buffer` bytes."""
    connection = socket.socket()
    connection.settimeout(TIMEOUT)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
    return connection
