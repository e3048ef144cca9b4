"""The live events: how many may listen, and who is sent away."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from mochi_app.pulse import Pulse
from mochi_app.web import routes
from tests.conftest import eventually


class Page:
    """A page that opens /events from an address, and what it is answered."""

    def __init__(self, app: FastAPI, address: str) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self._left = asyncio.Event()
        scope = {"type": "http", "method": "GET", "path": "/events", "query_string": b"",
                 "headers": [], "client": (address, 1)}  # fmt: skip
        self._task = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]

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

    async def leave(self) -> None:
        self._left.set()
        await self._task


@pytest.fixture
def app() -> FastAPI:
    live = SimpleNamespace(snapshot=lambda limit: {"jobs": []})
    studio: Any = SimpleNamespace(stopping=False, changed=Pulse(), live=live)
    app = FastAPI()
    routes.add_routes(app, studio)
    return app


async def test_no_address_takes_the_live_page_from_the_others(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MOST_STREAMS", 4)
    monkeypatch.setattr(routes, "STREAMS_OF_ADDRESS", 2)
    at_once = [Page(app, "10.0.0.1") for _ in range(9)]
    answers = [await page.answered() for page in at_once]
    assert answers == [200, 200, *[429] * 7]
    assert at_once[2].headers[b"retry-after"] == b"10"
    assert b"2 pages of your address listen already" in at_once[2].body
    others = [Page(app, address) for address in ("2001:db8::1", "2001:db8::2", "2001:db8::3")]
    assert [await page.answered() for page in others] == [200, 200, 429], "one /64 is one client"
    late = Page(app, "10.0.0.3")
    assert await late.answered() == 503
    assert late.headers[b"retry-after"] == b"10"
    assert b"4 pages listen already" in late.body
    await at_once[0].leave()
    again = [Page(app, "10.0.0.1"), Page(app, "10.0.0.3")]
    assert [await page.answered() for page in again] == [200, 503]
    for page in (at_once[1], again[0]):
        await page.leave()
    again = [Page(app, address) for address in ("10.0.0.3", "10.0.0.1")]
    assert [await page.answered() for page in again] == [200, 200]
    for page in [*others, *again]:
        await page.leave()


def test_a_team_behind_one_address_fits() -> None:
    assert routes.STREAMS_OF_ADDRESS >= 50 * 4
    assert routes.MOST_STREAMS > 2 * routes.STREAMS_OF_ADDRESS, "a client may have two addresses"
