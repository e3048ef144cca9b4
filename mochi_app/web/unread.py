"""Limits on unread answers, in total and by client.

A caller of an endpoint first posts, then opens an event stream for the answer. A post whose stream
is never opened leaves its answer in the server's memory. Only such posts are counted, by the
address they came from: clients that read their answers are never refused, however often they call.
ASGI middleware around the app, inside the authentication layer.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mochi_app.web.gradio_queue import MOST_SESSIONS
from mochi_app.web.throttle import address_of
from mochi_app.web.tickets import SECRET_HEADER

log = logging.getLogger(__name__)

# With any prefix: a proxy may pass its own on.
POST_PATH = re.compile(r"/gradio_api/(?:queue/join|call/(?:v2/)?[^/]+)/?\Z")
SESSION_PATH = re.compile(r"/gradio_api/queue/data/?\Z")
EVENT_PATH = re.compile(r"/gradio_api/call/(?:v2/)?[^/]+/([^/]+)/?\Z")
MOST_UNREAD = 750  # of all clients together; a third of what Gradio's queue can keep
UNREAD_SECONDS = 60.0  # how long an answer waits for its reader
ANSWER_BYTES = 4096  # more than Gradio's answer to a post


class Sessions(Protocol):
    """What the limits need from the queue; see `StudioQueue`."""

    @property
    def sessions(self) -> int:
        """How many sessions are owed an answer."""

    def session_of(self, event_id: str) -> str | None:
        """The session that is owed this event's answer."""

    def settle(self, session: str) -> bool:
        """Forget the session if it is owed nothing more; whether it was forgotten."""

    def forget(self, session: str) -> None:
        """Drop all the session's answers."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A post whose event stream has not been opened."""

    session: str
    client: str
    posted: float  # time.monotonic()


class UnreadPosts:
    """The unread posts, by client and by session, oldest first."""

    def __init__(self) -> None:
        self._posts: dict[str, Unread] = {}
        self._by_client: dict[str, dict[str, Unread]] = {}
        self._by_session: dict[str, dict[str, Unread]] = {}

    def __len__(self) -> int:
        return len(self._posts)

    def of(self, client: str) -> int:
        """How many belong to this client."""
        return len(self._by_client.get(client, ()))

    def oldest(self, client: str | None = None) -> Unread | None:
        """The oldest post of one client, or of all."""
        posts = self._posts if client is None else self._by_client.get(client, {})
        return next(iter(posts.values()), None)

    def greediest(self) -> str | None:
        """The client with the most posts; of several, the first."""
        return max(self._by_client, key=lambda client: len(self._by_client[client]), default=None)

    def add(self, key: str, post: Unread) -> None:
        """Count one more, replacing any with this key; an event's id is its post's key."""
        self._remove(key)
        self._posts[key] = post
        self._by_client.setdefault(post.client, {})[key] = post
        self._by_session.setdefault(post.session, {})[key] = post

    def take(self, session: str) -> None:
        """Stop counting the session's posts."""
        for key in list(self._by_session.get(session, ())):
            self._remove(key)

    def _remove(self, key: str) -> None:
        """Remove a post by its own client and session: clients choose session names, so a key may
        belong to any."""
        post = self._posts.pop(key, None)
        if post is None:
            return
        for posts, name in ((self._by_client, post.client), (self._by_session, post.session)):
            del posts[name][key]
            if not posts[name]:
                del posts[name]


class StreamLimits:
    """Refuses a post with 429 if its client, or all clients, leave too much unread."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        queue: Sessions,
        ticket_secret: str,
        most_unread: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_unread` posts of one client may wait for their reader."""
        self._app = app
        self._queue = queue
        self._secret = ticket_secret.encode()
        self._most_unread = most_unread
        self._clock = clock
        self._unread = UnreadPosts()
        self._posting: Counter[str] = Counter()  # by client: admitted, not yet answered
        self._open: Counter[str] = Counter()  # by session: streams being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request and pass it on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and POST_PATH.search(scope["path"]):
            await self._post(scope, receive, send)
        elif scope["method"] == "GET" and (session := self._session(scope)):
            await self._read(session, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    # Posts

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(SECRET_HEADER, "").encode()
        if hmac.compare_digest(given, self._secret):
            await self._app(scope, receive, send)
            return
        client = address_of(HTTPConnection(scope))
        self._expire()
        if (refusal := self._refusal(client)) is not None:
            await refusal(scope, receive, send)
            return
        self._drop_excess()
        self._posting[client] += 1
        try:
            await self._app(scope, receive, self._listening(client, send))
        finally:
            self._posting -= Counter([client])

    def _refusal(self, client: str) -> JSONResponse | None:
        """Why this client may not post now."""
        unread = self._unread.of(client) + self._posting[client]
        if unread >= self._most_unread:
            oldest = self._unread.oldest(client)
            age = self._clock() - oldest.posted if oldest else UNREAD_SECONDS
            return too_many(
                f"{unread} posts from your address wait for somebody to read their event stream,"
                f" at most {self._most_unread} may: open the stream of each post",
                UNREAD_SECONDS - age,
            )
        if self._queue.sessions + self._posting.total() >= MOST_SESSIONS:
            return too_many(
                f"{MOST_SESSIONS} answers are being read, the most this server takes", 1
            )
        return None

    def _listening(self, client: str, send: Send) -> Send:
        """Wrap `send` to count the post once its event's id is known, before its client knows
        it."""
        status, body = 0, b""

        async def listening(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and status == 200:
                body = (body + message.get("body", b""))[: ANSWER_BYTES + 1]
                if not message.get("more_body"):
                    self._posted(event_id_in(body), client)
            await send(message)

        return listening

    def _posted(self, event_id: str | None, client: str) -> None:
        if event_id is None:
            return
        session = self._queue.session_of(event_id) or event_id
        if not self._open[session]:
            self._unread.add(event_id, Unread(session, client, self._clock()))

    def _expire(self) -> None:
        """Drop posts that have waited too long."""
        limit = self._clock() - UNREAD_SECONDS
        while (post := self._unread.oldest()) is not None and post.posted <= limit:
            self._drop(post.session)

    def _drop_excess(self) -> None:
        """While there are too many in total, drop the oldest of the client with the most."""
        while len(self._unread) + self._posting.total() >= MOST_UNREAD:
            post = self._unread.oldest(self._unread.greediest())
            if post is None:
                return
            log.warning("more than %d posts wait to be read: one is dropped", MOST_UNREAD)
            self._drop(post.session)

    def _drop(self, session: str) -> None:
        self._unread.take(session)
        self._queue.forget(session)

    # Streams

    def _session(self, scope: Scope) -> str | None:
        """The session whose stream a GET opens."""
        path = scope["path"]
        if SESSION_PATH.search(path):
            query = parse_qs(scope["query_string"].decode("latin-1"))
            return query["session_hash"][-1] if "session_hash" in query else None
        if found := EVENT_PATH.search(path):
            return self._queue.session_of(found[1])
        return None

    async def _read(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._unread.take(session)
        self._open[session] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= Counter([session])
            if not self._open[session] and not self._queue.settle(session):
                # Something was posted while the stream ended, and needs a reader of its own.
                client = address_of(HTTPConnection(scope))
                self._unread.add(f"rest of {session}", Unread(session, client, self._clock()))


def event_id_in(body: bytes) -> str | None:
    """The event's id in Gradio's answer to a post."""
    if len(body) > ANSWER_BYTES:
        return None
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    event_id = answer.get("event_id") if isinstance(answer, dict) else None
    return event_id if isinstance(event_id, str) else None


def too_many(detail: str, seconds: float) -> JSONResponse:
    """A 429 response, to be retried after `seconds`."""
    wait = str(min(max(1, math.ceil(seconds)), int(UNREAD_SECONDS)))
    headers = {"retry-after": wait}
    return JSONResponse({"detail": f"{detail}; try again in {wait} s"}, 429, headers)
