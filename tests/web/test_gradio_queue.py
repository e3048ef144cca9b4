"""Gradio's own queue, hardened: the real thing behind real routes, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI

from mochi_app.web import gradio_queue as module
from mochi_app.web.gradio_queue import MOST_EVENTS, MOST_MESSAGES, StudioQueue, use_studio_queue
from tests.conftest import eventually


class App:
    """An app with three endpoints: one answers, one waits for the gate, one talks on and on."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = 0
        self.said = 0
        with gr.Blocks(analytics_enabled=False) as demo:
            gr.api(self.echo, api_name="echo", concurrency_limit=None)
            gr.api(self.wait, api_name="wait", concurrency_limit=1)
            gr.api(self.talk, api_name="talk", concurrency_limit=None)
        self.queue = use_studio_queue(demo, max_threads=8, update_seconds=0.05)
        self.app = FastAPI()
        gr.mount_gradio_app(self.app, demo, path="/")
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://127.0.0.1"
        )

    async def echo(self, text: str) -> str:
        return text

    async def wait(self, text: str) -> str:
        self.entered += 1
        await self.gate.wait()
        return text

    async def talk(self, text: str) -> AsyncIterator[str]:
        for number in range(2 * MOST_MESSAGES):
            self.said = number
            yield f"{text} {number}"
            if not number % 50:
                await asyncio.sleep(0.001)

    async def post(self, name: str, text: str, **body: Any) -> str:
        response = await self.client.post(
            f"/gradio_api/call/{name}", json={"data": [text]} | body, timeout=30
        )
        assert response.status_code == 200, response.text
        event_id: str = response.json()["event_id"]
        return event_id

    async def read(self, name: str, event_id: str) -> str:
        return (await self.client.get(f"/gradio_api/call/{name}/{event_id}", timeout=30)).text

    async def call(self, text: str = "hello") -> None:
        answer = await self.read("echo", await self.post("echo", text))
        assert answer == f'event: complete\ndata: ["{text}"]\n\n'


@pytest.fixture
async def gradio(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.1)
    monkeypatch.setenv("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000")
    found = App()
    async with found.app.router.lifespan_context(found.app):
        yield found
        found.gate.set()
        found.queue.close()
        await found.client.aclose()


async def test_what_was_read_is_forgotten_when_it_is_settled(gradio: App) -> None:
    event = await gradio.post("echo", "hello")
    assert gradio.queue.session_of(event) == event
    assert not gradio.queue.settle(event), "it has not been read"
    assert "hello" in await gradio.read("echo", event)
    assert gradio.queue.sessions == 1, "Gradio keeps it; if no more, `settle` has had its day"
    assert gradio.queue.settle(event)
    assert gradio.queue.sessions == 0
    assert gradio.queue.pending_event_ids_session == {}
    assert gradio.queue.settle("never heard of")


async def test_a_finished_answer_is_found_by_its_event(gradio: App) -> None:
    event = await gradio.post("echo", "hello", session_hash="tab")
    await eventually(lambda: event not in gradio.queue.event_ids_to_events)
    assert gradio.queue.session_of(event) == "tab"
    assert gradio.queue.session_of("unknown") is None


async def test_a_lost_session_costs_its_own_client_only(
    gradio: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Gradio itself each of the loops would end with a KeyError."""
    estimates, broadcast = [0], StudioQueue.broadcast_estimations

    def counted(queue: StudioQueue, *arguments: Any) -> None:
        broadcast(queue, *arguments)
        estimates[0] += 1

    running, waiting = await gradio.post("wait", "a"), await gradio.post("wait", "b")
    await eventually(lambda: gradio.entered == 1)
    for session in (running, waiting):
        del gradio.queue.pending_messages_per_session[session]
    monkeypatch.setattr(StudioQueue, "broadcast_estimations", counted)
    await eventually(lambda: estimates[0] >= 2)
    gradio.gate.set()
    await eventually(lambda: gradio.entered == 2)
    await gradio.call()
    assert gradio.queue.problem is None


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_dead_loop_takes_nothing_along(
    gradio: App, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    running, waiting = await gradio.post("wait", "a"), await gradio.post("wait", "b")
    await eventually(lambda: gradio.entered == 1)
    take, ill = StudioQueue.get_events, [True]

    def taken(queue: StudioQueue) -> Any:
        events = take(queue) if when == "after" or not ill[0] else None
        if ill[0] and (events or when == "before"):
            raise KeyError("tab")
        return events

    monkeypatch.setattr(StudioQueue, "get_events", taken)
    lost = await gradio.post("echo", "lost?")
    reason = "Gradio's queue stopped (processing: KeyError: 'tab'); it is started again"
    await eventually(lambda: gradio.queue.problem == reason)
    assert not gradio.queue.stopped, "readers would be told that the server stopped"
    ill[0] = False
    assert '"lost?"' in await gradio.read("echo", lost)
    gradio.gate.set()
    assert '"a"' in await gradio.read("wait", running)
    assert '"b"' in await gradio.read("wait", waiting)
    await eventually(lambda: gradio.queue.problem is None)


async def test_a_restart_takes_nothing_along(gradio: App) -> None:
    running = await gradio.post("wait", "a")
    await eventually(lambda: gradio.entered == 1)
    gradio.queue.restart("a test")
    await eventually(lambda: gradio.queue.problem)
    await gradio.call()
    await eventually(lambda: gradio.queue.problem is None)
    gradio.gate.set()
    assert '"a"' in await gradio.read("wait", running)
    assert not any(loop.done() for loop in gradio.queue._loops.values())


async def test_a_session_that_reads_nothing_may_not_post_for_ever(gradio: App) -> None:
    for _ in range(MOST_EVENTS):
        await gradio.post("echo", "x", session_hash="tab")
    response = await gradio.client.post(
        "/gradio_api/call/echo", json={"data": ["x"], "session_hash": "tab"}
    )
    assert response.status_code == 429
    assert response.headers["retry-after"] == "5"
    assert "at most 128 may: read its event stream" in response.json()["detail"]
    await gradio.call()


async def test_the_box_of_a_session_is_bounded(gradio: App) -> None:
    """And whoever reads later is told that it was too late."""
    event = await gradio.post("talk", "word")
    await eventually(lambda: event not in gradio.queue.event_ids_to_events)
    assert gradio.said < 2 * MOST_MESSAGES - 1, "it is not heard any more, so it was stopped"
    assert gradio.queue.pending_messages_per_session[event].qsize() <= MOST_MESSAGES + 1
    last = (await gradio.read("talk", event)).strip().split("\n\n")[-1]
    assert last.startswith("event: error")
    assert "ask for the job by its id" in last


async def test_what_is_forgotten_runs_if_it_waits_and_ends_if_it_runs(gradio: App) -> None:
    running, waiting = await gradio.post("wait", "a"), await gradio.post("wait", "b")
    talking = await gradio.post("talk", "word")
    await eventually(lambda: gradio.entered == 1 and gradio.said > 0)
    for session in (running, waiting, talking):
        gradio.queue.forget(session)
    await eventually(lambda: talking not in gradio.queue.event_ids_to_events)
    gradio.gate.set()
    await eventually(lambda: gradio.entered == 2)
    assert gradio.queue.sessions == 0
    await gradio.call()
