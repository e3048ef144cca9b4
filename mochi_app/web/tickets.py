"""Tickets: posts to the app's own Gradio queue, each worth one turn at a slot.

A ticket calls the endpoint `engine_turn` in process (httpx over ASGI, no socket) with a secret
header, and reads the event stream to its end; Gradio's queue lets as many run as there are slots.
Tickets carry no job: the studio decides what a granted one runs. Whatever happens to one, the
reconciler posts another as long as the studio needs it. A watchdog detects what no single ticket
can: a slot and a job that wait for each other because no ticket has been granted for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable

import httpx
from starlette.types import ASGIApp

from mochi_app.changes import Changes

log = logging.getLogger(__name__)

SECRET_HEADER = "x-mochi-ticket"
ENDPOINT = "engine_turn"
RETRY_SECONDS = 1.0
LEAST_SECONDS = 0.1  # between two tickets that found nothing to do
WATCH_SECONDS = 1.0
STALL_SECONDS = 10.0  # normally a ready slot and a job are paired within milliseconds


class TicketError(RuntimeError):
    """The queue refused a ticket, or dropped it."""


class Tickets:
    """Keeps as many tickets queued or granted as `needed()` returns, checked at every beat."""

    def __init__(
        self,
        app: ASGIApp,
        secret: str,
        needed: Callable[[], int],
        changed: Changes,
        *,
        starving: Callable[[], bool] = lambda: False,
        on_stall: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`starving()` is whether a ready slot has no turn although a job waits; if it stays true
        for a while, `on_stall(reason)` is called and all tickets are posted again."""
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app),
            base_url="http://127.0.0.1",
            headers={SECRET_HEADER: secret},
            timeout=None,
        )
        self._needed = needed
        self._changed = changed
        self._starving = starving
        self._on_stall = on_stall
        self._live: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self.last_error: str | None = None
        self.problem: str | None = None  # why waiting jobs get no turn

    def start(self) -> None:
        """Start the reconciler and the watchdog."""
        self._loops = [
            asyncio.create_task(self._keep(self._reconcile), name="tickets"),
            asyncio.create_task(self._keep(self._watch), name="tickets watch"),
        ]

    async def stop(self) -> None:
        """Drop all tickets; runs on slots continue."""
        tasks = [*self._live, *self._loops]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _keep(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run one loop forever: without it, no waiting job would run any more."""
        while True:
            try:
                await loop()
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                log.exception("a loop of the tickets ended; it is started again")
                await asyncio.sleep(RETRY_SECONDS)

    async def _reconcile(self) -> None:
        while True:
            count = self._changed.count
            while len(self._live) < self._needed():
                task = asyncio.create_task(self._ticket(), name="ticket")
                self._live.add(task)
                task.add_done_callback(self._ended)
            await self._changed.after(count)

    async def _watch(self) -> None:
        since: float | None = None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if not self._starving():
                since, self.problem = None, None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= STALL_SECONDS:
                self.problem = f"no ticket was granted for {STALL_SECONDS:g} s"
                since = None
                self._renew(self.problem)

    def _renew(self, reason: str) -> None:
        """Cancel all tickets; the reconciler posts new ones. Runs on slots continue."""
        log.critical("%s: %d tickets are posted anew", reason, len(self._live))
        self._on_stall(reason)
        for task in self._live:
            task.cancel()
        self._changed.beat()  # even if none was left

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._live.discard(task)
        self._changed.beat()

    async def _ticket(self) -> None:
        began = time.monotonic()
        try:
            await self._post()
            self.last_error = None
            if time.monotonic() - began < LEAST_SECONDS:  # there was nothing to run after all
                await asyncio.sleep(LEAST_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever the queue raised, another follows
            self.last_error = f"{type(error).__name__}: {error}"
            log.error("a ticket was lost: %s", self.last_error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _post(self) -> None:
        path = f"/gradio_api/call/{ENDPOINT}"
        response = await self._client.post(path, json={"data": []})
        if response.status_code != httpx.codes.OK:
            raise TicketError(f"the queue answered {response.status_code}")
        stream = await self._client.get(f"{path}/{response.json()['event_id']}")
        events = [line[7:] for line in stream.text.splitlines() if line.startswith("event: ")]
        if not events or events[-1] != "complete":
            data = stream.text.strip().splitlines()[-1:] or ["nothing"]
            raise TicketError(f"the queue ended a ticket with {json.dumps(data[0][:200])}")
