"""What every request passes through, whoever sends it: headers, origin, size, and which of
Gradio's routes there are.

Small ASGI layers without state. Who a caller is and what it may do is decided in `auth.py`.
"""

from __future__ import annotations

import asyncio
import html
import json
import re
import string
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradio.processing_utils import client_utils
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 256 << 10
MULTIPART_FORM = "multipart/form-data"
BODY_SECONDS = 30.0  # in which a request's body must have come
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
REFUSED_PAGE = string.Template((Path(__file__).parent / "refused.html").read_text("utf-8"))

# Gradio's page runs inline scripts and compiles its templates; no source is another site's.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:;"
    " font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self';"
    " form-action 'self'; frame-ancestors 'self'"
)

# What page and clients need of Gradio. The rest (uploads, proxy, streams, deep links, recordings,
# monitoring, vibe mode, run history, …) is not there.
GRADIO_ASSETS = re.compile(  # the same for everybody: Gradio's published code, styles and icons
    r"/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d{1,4})?"
    r"|/(static|assets|svelte)/.+|/gradio_api/theme\.css"
)
GRADIO_PLAIN_READS = re.compile(
    rf"{GRADIO_ASSETS.pattern}|/|/config/?"
    r"|/gradio_api/(info/?|openapi\.json|startup-events|app_id/?|user/?|login_check/?|queue/status)"
)
PUBLISHED = re.compile(rf"{GRADIO_ASSETS.pattern}|/page/[^/]+/[^/]+")  # and our own code
GRADIO_STREAMS = re.compile(r"/gradio_api/(queue/data|heartbeat/[^/]+|call/(v2/)?[^/]+/[^/]+)")
GRADIO_WRITES = re.compile(
    r"/gradio_api/(queue/join|cancel|reset/?|component_server/?|(run|api)/[^/]+/?"
    r"|call/(v2/)?[^/]+/?)"
)

Reply = Callable[[Scope, Receive, Send], Awaitable[None]]


def refusal(status: int, told: str, **headers: str) -> Reply:
    """An answer in JSON, as FastAPI words its own."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"detail": told}, status, named)


def explained_refusal(scope: Scope, status: int, told: str) -> Reply:
    """A refusal that a person may get to see: a page for a browser that opens one, else JSON."""
    if "text/html" not in Headers(scope=scope).get("accept", ""):
        return refusal(status, told)
    page = REFUSED_PAGE.substitute(told=html.escape(told))
    return HTMLResponse(page, status, {"cache-control": "no-store"})


class SecurityHeaders:
    """Adds the headers that keep a browser from being turned against its user."""

    def __init__(self, app: ASGIApp, frame_ancestors: Iterable[str] = ()) -> None:
        self.app = app
        self._headers = {
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "content-security-policy": " ".join((POLICY, *frame_ancestors)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)


class OwnOrigin:
    """Refuses what another site's page sends: whoever is logged in here may be looking at it.

    `X-Forwarded-Host` is believed of anybody: a page of another site cannot send it, as that takes
    a preflight, which is refused.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = (), public_url: str = "") -> None:
        self.app = app
        self._allowed = frozenset(allowed)
        self._public = place(public_url) if "://" in public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self._foreign(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await explained_refusal(scope, 403, told_of_origin(scope))(scope, receive, send)

    def _foreign(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        method, path = scope.get("method"), scope["path"]
        if method in ("GET", "HEAD") and PUBLISHED.fullmatch(path):
            return False
        site = headers.get("sec-fetch-site")  # the browser's own word: no script can write it
        origin = headers.get("origin")
        if site in ("same-origin", "none"):
            return False
        if origin is None:
            leaving = method in SAFE_METHODS and path != "/logout"
            return site is not None and not leaving
        if origin.lower() in self._allowed:
            return False
        asked = place(origin)
        if asked is None or asked == self._public:
            return asked is None
        hosts = (headers.get("host", ""), headers.get("x-forwarded-host", "").split(",")[0].strip())
        return not any(at_host(origin, host, guess_port=site is None) for host in hosts if host)


def at_host(origin: str, host: str, guess_port: bool) -> bool:
    """Whether a page of this origin is one of this host's, as a `Host` header names it. One that
    bears no port may have lost it at a proxy: with `guess_port` it may be any."""
    scheme = origin.split("://")[0]
    asked, own = place(origin), place(f"{scheme}://{host}")
    if asked is None or own is None:
        return False
    portless = urlsplit(f"{scheme}://{host}").port is None
    return asked == own or (guess_port and portless and asked[0] == own[0])


def told_of_origin(scope: Scope) -> str:
    """Why a page's call is refused, and what to do when the page is this server's own."""
    headers = Headers(scope=scope)
    return (
        f"A page of {headers.get('origin', 'another site')} may not call this server, which was"
        f" asked as {headers.get('host', 'nothing')}. If it is this server's own page, the proxy"
        " in front must pass the Host header on (nginx: proxy_set_header Host $http_host), see"
        " docs/operations.md. Other sites that may call are named in MOCHI_ALLOWED_ORIGINS."
    )


def place(url: str) -> tuple[str, int] | None:
    """Host and port of a URL; None when it has none."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    host = (parts.hostname or "").removesuffix(".")
    return (host, port) if host else None


class BoundedBody:
    """Reads a request's body whole, so far as it may be, and refuses what no caller needs to send:
    more than `MAX_BODY_BYTES`, files, and references to files. Multipart, which files come in, is
    left to the login: Gradio's JavaScript client sends name and password so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = media_type(headers)
        login = kind == MULTIPART_FORM and scope["path"] == "/login"
        if kind.startswith("multipart/") and not login:
            await refusal(415, "nothing is uploaded here: send JSON")(scope, receive, send)
            return
        try:
            body = await whole_body(headers, receive)
            check_json(body)
        except BadBody as bad:
            await refusal(bad.status, str(bad), connection="close")(scope, receive, send)
            return
        await self.app(scope, replaying(body, receive), send)


def media_type(headers: Headers) -> str:
    """The content type in lower case, without its parameters."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


class BadBody(Exception):
    """A body that is refused, with this HTTP status."""

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


async def whole_body(headers: Headers, receive: Receive) -> bytes:
    """The body, whether its length was told or not.

    Raises:
        BadBody: it is too long, too late, or cut off.
    """
    told = headers.get("content-length", "0")
    too_long = BadBody(413, f"the body is too long: at most {MAX_BODY_BYTES} bytes are taken")
    if not told.isascii() or not told.isdecimal():
        raise BadBody(400, "content-length: expected a number")
    if len(told) > 18 or int(told) > MAX_BODY_BYTES:
        raise too_long
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise BadBody(400, "the body was cut off")
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > MAX_BODY_BYTES:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise BadBody(408, f"the body did not come within {BODY_SECONDS:g} s") from None


def check_json(body: bytes) -> None:
    """See that JSON refers to no file: Gradio would fetch a URL, or look for a path, in one.

    What is no JSON is left for its route to refuse.

    Raises:
        BadBody: it does, or is nested too deeply.
    """
    try:
        waiting: list[Any] = [json.loads(body)] if body else []
    except RecursionError:
        raise BadBody(400, "the body is nested too deeply") from None
    except ValueError:
        return
    while waiting:
        value = waiting.pop()
        if client_utils.is_file_obj_with_meta(value):
            raise BadBody(422, "the body refers to a file: no path and no URL is opened here")
        if isinstance(value, MutableMapping):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body once more, then whatever comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class OnlyWhatIsNeeded:
    """Around Gradio's app: routes that page and clients do not need are not there, and HEAD, which
    Gradio's routes do not take, is GET; the server leaves the body out. A stream is not opened for
    it: that would take its answer from whoever waits for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http" and not needed(scope["method"], scope["path"]):
            await refusal(404, "there is nothing here")(scope, receive, send)
        elif scope.get("method") == "HEAD" and GRADIO_PLAIN_READS.fullmatch(scope["path"]):
            await self.app({**scope, "method": "GET"}, receive, send)
        else:
            await self.app(scope, receive, send)


class WholeStreams:
    """Around Gradio's app: asked for an event that it does not have (any more), it says so in the
    stream and then breaks the connection off. Here the stream ends as others do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except RuntimeError as error:  # Starlette's: "response already started"
            if not begun or not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def needed(method: str, path: str) -> bool:
    """Whether page or clients need this of Gradio."""
    if method in ("GET", "HEAD"):
        return any(reads.fullmatch(path) for reads in (GRADIO_PLAIN_READS, GRADIO_STREAMS))
    return method == "POST" and GRADIO_WRITES.fullmatch(path) is not None
