"""Limits on unread answers: who is refused, who is dropped, and who never is."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mochi_app.web import unread as limits
from mochi_app.web.gradio_queue import MOST_SESSIONS
from mochi_app.web.throttle import address_of
from mochi_app.web.tickets import SECRET_HEADER
from mochi_app.web.unread import (
    MOST_UNREAD,
    UNREAD_SECONDS,
    StreamLimits,
    Unread,
    UnreadPosts,
    event_id_in,
)

DOORS = (
    "/gradio_api/call/list_jobs",
    "/gradio_api/call/list_jobs/",
    "/gradio_api/call/v2/list_jobs",
    "/gradio_api/queue/join",
    "/proxied/gradio_api/queue/join",
)


class Queue:
    """The app behind the limits, and what the limits ask of Gradio's queue: an event a session."""

    def __init__(self) -> None:
        self.owed: dict[str, str] = {}  # session by event id
        self.forgotten: list[str] = []
        self.posts = 0
        self.extra = 0
        self.status = 200
        self.unsettled = False

    @property
    def sessions(self) -> int:
        return len(self.owed) + self.extra

    def session_of(self, event_id: str) -> str | None:
        return self.owed.get(event_id)

    def settle(self, session: str) -> bool:
        if not self.unsettled:
            self.owed = {event: owed for event, owed in self.owed.items() if owed != session}
        return not self.unsettled

    def forget(self, session: str) -> None:
        self.forgotten.append(session)
        self.owed = {event: owed for event, owed in self.owed.items() if owed != session}

    async def answer(self, request: Request) -> Response:
        if request.method == "GET":
            return PlainTextResponse("event: complete\n\n")
        self.posts += 1
        if self.status != 200:
            return JSONResponse({"detail": "no"}, self.status)
        event = f"e{self.posts}"
        self.owed[event] = request.query_params.get("session", f"s{self.posts}")
        return JSONResponse({"event_id": event})


class Door:
    """A client of the limited app."""

    def __init__(self, queue: Queue, most_unread: int = 3) -> None:
        self.now = 1000.0
        self.inner = Starlette(
            routes=[Route("/{path:path}", queue.answer, methods=["GET", "POST"])]
        )
        self.app = StreamLimits(
            self.inner,
            queue=queue,
            ticket_secret="secret",
            most_unread=most_unread,
            clock=lambda: self.now,
        )

    async def _ask(self, method: str, path: str, address: str, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers)

    async def post(
        self, path: str = DOORS[0], address: str = "10.0.0.1", **headers: str
    ) -> httpx.Response:
        return await self._ask("POST", path, address, **headers)

    async def read(self, path: str, address: str = "10.0.0.1") -> httpx.Response:
        return await self._ask("GET", path, address)


@pytest.mark.parametrize("path", DOORS)
async def test_too_many_unread_posts_are_refused_at_every_door(path: str) -> None:
    door = Door(queue := Queue())
    assert [(await door.post(path)).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    door.now += 12.5
    refusal = await door.post(path)
    assert refusal.headers["retry-after"] == "48"
    assert refusal.json()["detail"] == (
        "3 posts from your address wait for somebody to read their event stream, at most 3 may:"
        " open the stream of each post; try again in 48 s"
    )
    assert queue.posts == 3
    assert (await door.post(path, "10.0.0.2")).status_code == 200  # others are not touched


async def test_whoever_reads_is_never_refused() -> None:
    door = Door(queue := Queue())
    for number in range(1, 50):
        assert (await door.post()).status_code == 200
        await door.read(f"/gradio_api/call/list_jobs/e{number}")
    assert queue.owed == {}
    for number in range(50, 99):
        path = f"/gradio_api/queue/join?session=tab{number % 2}"
        assert (await door.post(path)).status_code == 200
        await door.read(f"/gradio_api/queue/data?session_hash=tab{number % 2}")


async def test_reading_one_stream_of_a_session_reads_all_its_posts() -> None:
    door = Door(Queue())
    for _ in range(3):
        await door.post("/gradio_api/queue/join?session=tab")
    assert (await door.post()).status_code == 429
    await door.read("/gradio_api/queue/data?session_hash=tab")
    assert (await door.post()).status_code == 200


async def test_posts_to_a_session_that_is_being_read_do_not_count() -> None:
    door = Door(queue := Queue(), most_unread=1)
    await door.post("/gradio_api/queue/join?session=tab")
    codes: list[int] = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        door.app._app = door.inner
        for _ in range(3):
            codes.append((await door.post("/gradio_api/queue/join?session=tab")).status_code)
        await PlainTextResponse("done")(scope, receive, send)

    door.app._app = stream
    await door.read("/gradio_api/queue/data?session_hash=tab")
    assert codes == [200, 200, 200]
    assert queue.owed == {}


async def test_what_is_left_when_a_stream_ends_counts_again() -> None:
    door = Door(queue := Queue(), most_unread=1)
    await door.post("/gradio_api/queue/join?session=tab")
    queue.unsettled = True
    await door.read("/gradio_api/queue/data?session_hash=tab")
    assert (await door.post()).status_code == 429
    door.now += UNREAD_SECONDS
    assert (await door.post()).status_code == 200
    assert queue.forgotten == ["tab"]


async def test_a_session_named_like_an_event_confuses_nothing() -> None:
    door = Door(queue := Queue(), most_unread=20)
    for _ in range(5):
        await door.post("/gradio_api/queue/join?session=tab")
    await door.post("/gradio_api/queue/join?session=e1")
    queue.unsettled = True
    await door.read("/gradio_api/queue/data?session_hash=e1")
    door.now += UNREAD_SECONDS
    assert (await door.post()).status_code == 200
    assert sorted(queue.forgotten) == ["e1", "tab"]
    assert len(door.app._unread) == 1


NAMES = st.sampled_from("abcd")


@given(st.lists(st.tuples(NAMES, NAMES, st.sampled_from("xyz"), st.booleans())))
def test_whatever_the_names_every_post_is_counted_once_and_can_be_dropped(
    acts: list[tuple[str, str, str, bool]],
) -> None:
    posts, known = UnreadPosts(), dict[str, Unread]()
    for key, session, client, added in acts:
        if added:
            known[key] = Unread(session, client, 0.0)
            posts.add(key, known[key])
        else:
            known = {key: post for key, post in known.items() if post.session != session}
            posts.take(session)
        assert len(posts) == len(known) == sum(posts.of(client) for client in "xyz")
    for _ in range(len(known)):
        if post := posts.oldest(posts.greediest()):
            posts.take(post.session)
    assert len(posts) == 0


async def test_an_unread_answer_is_dropped_after_a_while() -> None:
    door = Door(queue := Queue())
    await door.post()
    door.now += UNREAD_SECONDS - 1
    await door.post(address="10.0.0.2")
    assert queue.forgotten == []
    door.now += 1
    await door.post(address="10.0.0.2")
    assert queue.forgotten == ["s1"]


async def test_refused_and_failed_posts_do_not_count() -> None:
    door = Door(queue := Queue(), most_unread=1)
    queue.status = 422
    assert [(await door.post()).status_code for _ in range(3)] == [422, 422, 422]
    queue.status = 200
    assert (await door.post()).status_code == 200


async def test_a_ticket_passes_every_limit_and_a_wrong_secret_does_not() -> None:
    door = Door(queue := Queue(), most_unread=1)
    await door.post()
    queue.extra = MOST_SESSIONS
    assert (await door.post(**{SECRET_HEADER: "secret"})).status_code == 200
    assert (await door.post(**{SECRET_HEADER: "sesam"})).status_code == 429


async def test_the_oldest_of_the_greediest_make_room_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MOST_UNREAD", 6)
    door = Door(queue := Queue(), most_unread=4)
    for address in ("10.0.0.1", *["10.0.0.9"] * 4, "10.0.0.2"):
        assert (await door.post(address=address)).status_code == 200
    await door.post(address="10.0.0.3")
    await door.post(address="10.0.0.4")
    assert queue.forgotten == ["s2", "s3"]  # of 10.0.0.9
    assert len(queue.owed) == 6


async def test_thousands_of_addresses_stay_below_what_gradio_keeps() -> None:
    door = Door(queue := Queue())
    for number in range(MOST_UNREAD + 50):
        address = f"10.0.{number // 250}.{number % 250}"
        assert (await door.post(address=address)).status_code == 200
    assert len(queue.owed) == MOST_UNREAD
    assert queue.forgotten == [f"s{number}" for number in range(1, 51)]


async def test_no_more_sessions_than_gradio_can_keep() -> None:
    door = Door(queue := Queue())
    queue.extra = MOST_SESSIONS
    refusal = await door.post()
    assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "1")
    queue.extra -= 1
    assert (await door.post()).status_code == 200


async def test_other_requests_are_not_looked_at() -> None:
    door = Door(Queue(), most_unread=1)
    await door.post()
    for path in ("/gradio_api/upload", "/gradio_api/call/a/b", "/gradio_api/cancel", "/livez"):
        assert (await door.post(path)).status_code == 200
    assert (await door.read("/gradio_api/queue/data")).status_code == 200


@pytest.mark.parametrize(
    ("address", "client"),
    [
        (("10.1.2.3", 5), "10.1.2.3"),
        (("::ffff:10.1.2.3", 5), "10.1.2.3"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::/64"),
        (("testclient", 5), "testclient"),
        (None, ""),
    ],
)
def test_a_client_is_its_address_or_its_network(
    address: tuple[str, int] | None, client: str
) -> None:
    assert address_of(HTTPConnection({"type": "http", "client": address})) == client


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"x"', b'{"event_id": 5}', b"{", b'{"event_id": "' + b"x" * 5000 + b'"}']
)
def test_an_answer_without_an_event_is_none(body: bytes) -> None:
    assert event_id_in(body) is None
