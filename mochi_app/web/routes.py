"""Plain HTTP routes beside Gradio's: probes, metrics, live events, files.

A file is found by its job's id alone; no path ever comes from a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from gradio.route_utils import FnIndexInferError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from mochi_app.jobs import JOB_ID, JobStatus, NotFound, RequestError
from mochi_app.store_errors import reason_of
from mochi_app.studio import Studio
from mochi_app.web.doors import address_of, is_stranger

log = logging.getLogger(__name__)

EVENTS_INTERVAL = 0.2  # seconds; at most so often a page hears of changes
KEEPALIVE_SECONDS = 15.0
OPENLY = ("slot", "state")  # what /healthz tells of a slot to strangers
EVENTS_BYTES = 20e6  # a second, to all pages together; with many pages each hears less often
MOST_STREAMS = 768  # pages that may listen at a time
STREAMS_OF_ADDRESS = 256  # of them, from one address
RETRY_SECONDS = 10  # after which a page that was sent away may ask again
PIECE_BYTES = 1 << 16  # written at a time: a page that does not read holds no more than two
LIVE_JOBS = 200  # jobs in one event; the rest of a longer queue is asked for by page


class EventFeed:
    """The live state, serialised for all tabs at once, at most once an interval.

    Each event is the whole snapshot: a page that missed one needs no repair.

    No address has more than a third of the pages that may listen: a client has one of IPv4 and one
    of IPv6, and leaves a third to the others. That is 256, not fewer, as behind a proxy that is not
    trusted (`MOCHI_TRUSTED_PROXIES`) everybody has one address: fifty people with five tabs each.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._built_at = -math.inf  # time.monotonic()
        self._count = -1  # changes that the payload shows
        self._payload = b""
        self._open: Counter[str] = Counter()  # pages that listen, by address

    @property
    def _interval(self) -> float:
        """Seconds between two events of a page."""
        return max(EVENTS_INTERVAL, self._open.total() * len(self._payload) / EVENTS_BYTES)

    @contextlib.contextmanager
    def seat(self, address: str) -> Iterator[None]:
        """A place among the pages that listen.

        Raises:
            HTTPException: there is none, for this address (429) or for anybody (503).
        """
        later = {"retry-after": str(RETRY_SECONDS)}
        if self._open[address] >= STREAMS_OF_ADDRESS:
            told = f"{STREAMS_OF_ADDRESS} pages of your address listen already: close some of them"
            raise HTTPException(429, told, later)
        if self._open.total() >= MOST_STREAMS:
            raise HTTPException(503, f"{MOST_STREAMS} pages listen already: try again later", later)
        self._open[address] += 1
        try:
            yield
        finally:
            self._open -= Counter([address])

    def _serialised(self) -> tuple[bytes, int]:
        """The newest payload and the number of changes it shows."""
        changed = self._studio.changed.count
        age = time.monotonic() - self._built_at
        if age >= 1 or (changed != self._count and age >= self._interval / 2):  # ETAs age alone
            self._built_at, self._count = time.monotonic(), changed
            snapshot = self._studio.live.snapshot(LIVE_JOBS)
            self._payload = b"data: " + orjson.dumps(snapshot) + b"\n\n"
        return self._payload, self._count

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events until the client or the server goes."""
        while not self._studio.stopping:
            payload, count = self._serialised()
            for start in range(0, len(payload), PIECE_BYTES):
                yield payload[start : start + PIECE_BYTES]
            await asyncio.sleep(self._interval)
            try:
                async with asyncio.timeout(KEEPALIVE_SECONDS):
                    await self._studio.changed.after(count)
            except TimeoutError:
                yield b": still here\n\n"


class Listening(StreamingResponse):
    """The stream of a feed. It has its seat from before its first byte until its client is gone,
    so that pages which come in one moment are counted one by one."""

    def __init__(self, feed: EventFeed, address: str) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(feed.stream(), media_type="text/event-stream", headers=headers)
        self._feed = feed
        self._address = address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.seat(self._address):
            await super().__call__(scope, receive, send)


def add_routes(app: FastAPI, studio: Studio) -> None:
    """Put the routes onto the parent app; before Gradio is mounted at its root."""
    router = APIRouter()
    feed = EventFeed(studio)

    @router.get("/livez")
    async def livez() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok\n")

    @router.get("/healthz")
    async def healthz(request: Request) -> JSONResponse:
        """200 when a video could be made now, else 503 with the reasons. Who has not logged in
        where one has to gets no more of the slots than their state."""
        health = studio.health()
        if is_stranger(request):
            health["slots"] = [{name: slot[name] for name in OPENLY} for slot in health["slots"]]
        return JSONResponse(health, status_code=200 if health["ok"] else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        text = await asyncio.to_thread(studio.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/events")
    async def events(request: Request) -> Listening:
        """The live state as server-sent events; 429 or 503 when too many listen."""
        return Listening(feed, address_of(request))

    @router.api_route("/files/{job_id}", methods=["GET", "HEAD"])
    async def video(job_id: str, download: bool = False) -> FileResponse:
        """The job's MP4; answers Range."""
        view = found(studio, job_id)
        with disk_errors():
            path = studio.media.video_path(job_id)
        if path is None and view["evicted_at"] is None:
            log.error("job %s: its video is gone from the disk", job_id)
            studio.changed.beat()  # its view says so from now on
        return file_response(path, "video/mp4", download)

    @router.api_route("/files/{job_id}/poster", methods=["GET", "HEAD"])
    async def poster(job_id: str) -> FileResponse:
        """The job's poster."""
        job_id = found(studio, job_id)["id"]
        with disk_errors():
            path = studio.media.poster_path(job_id)
        return file_response(path, "image/webp", False)

    @router.api_route("/gradio_api/file={path:path}", methods=["GET", "HEAD"])
    async def gradio_file(path: str) -> FileResponse:
        """A video by the path that Gradio's clients were told. The path is not opened: it names a
        job's video or nothing."""
        folder, _, name = path.rpartition("/")
        job_id = name.removesuffix(".mp4")
        if folder != str(studio.media.videos) or not JOB_ID.fullmatch(job_id):
            raise HTTPException(404, "no such file")
        return await video(job_id)

    app.include_router(router)


def explain_bad_calls(app: FastAPI) -> None:
    """Answer a call that does not fit its endpoint with what is wrong, not with 500.

    Gradio's `/call/v2/<name>` lets the errors of its own argument check through, and others those
    of looking up a page by its name, a function or a component by its number.
    """

    async def explain(request: Request, error: Exception) -> Response:
        unknown = isinstance(error, KeyError) and isinstance(error.args[0], int)
        if unknown or isinstance(error, FnIndexInferError):
            return JSONResponse({"detail": "there is no such function or component"}, 404)
        if isinstance(error, KeyError) and error.args[0] == request.query_params.get("page"):
            return JSONResponse({"detail": "there is no such page"}, 404)
        if "/gradio_api/call/v2/" not in request.url.path:
            raise error
        if isinstance(error, KeyError):
            return JSONResponse({"detail": f"no endpoint is named {error.args[0]}"}, 404)
        return JSONResponse({"detail": str(error)}, 422)

    for route in app.routes:
        if isinstance(route, Mount) and isinstance(route.app, FastAPI):
            for kind in (KeyError, TypeError, FnIndexInferError):
                route.app.add_exception_handler(kind, explain)


def found(studio: Studio, job_id: str) -> dict[str, Any]:
    """The COMPLETED job's view; HTTP 404 for anything else."""
    try:
        view = studio.status(job_id)
    except NotFound as error:
        raise HTTPException(404, str(error)) from None
    except RequestError as error:
        raise HTTPException(404, str(error)) from None
    if view["status"] != JobStatus.COMPLETED:
        raise HTTPException(404, f"job {job_id} is {view['status']}: it has no files")
    return view


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Answer an error of the disk with HTTP 503 and its reason."""
    try:
        yield
    except OSError as error:
        told = f"the file cannot be read now: {reason_of(error)}"
        raise HTTPException(503, told, {"retry-after": str(RETRY_SECONDS)}) from error


def file_response(path: Any, media_type: str, download: bool) -> FileResponse:
    """The file, to be asked for again each time: a deleted one must not live on in a cache."""
    if path is None:
        raise HTTPException(404, "the file is not here any more")
    return FileResponse(
        path,
        media_type=media_type,
        filename=path.name,
        content_disposition_type="attachment" if download else "inline",
        headers={"cache-control": "private, no-cache"},
    )
