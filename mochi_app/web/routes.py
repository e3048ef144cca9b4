"""Plain HTTP routes beside Gradio's: probes, metrics, live events, files.

A file is found by its job's id alone; no path ever comes from a caller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Mount

from mochi_app.jobs import JobStatus, NotFound, RequestError
from mochi_app.studio import Studio

EVENTS_INTERVAL = 0.2  # seconds; at most so often a page hears of changes
KEEPALIVE_SECONDS = 15.0
LIVE_JOBS = 200  # jobs in one event; the rest of a longer queue is asked for by page


class EventFeed:
    """The live state, serialised once per change and second for all tabs.

    Each event is the whole snapshot: a page that missed one needs no repair.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._key = (-1, 0)
        self._payload = b""
        self.open = 0

    def _serialised(self) -> bytes:
        key = (self._studio.changed.count, int(time.monotonic()))  # ETAs age without a change
        if self._key != key:
            self._key = key
            snapshot = self._studio.live.snapshot(LIVE_JOBS)
            self._payload = b"data: " + orjson.dumps(snapshot) + b"\n\n"
        return self._payload

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events until the client or the server goes."""
        self.open += 1
        try:
            while not self._studio.stopping:
                count = self._studio.changed.count
                yield self._serialised()
                await asyncio.sleep(EVENTS_INTERVAL)
                try:
                    await asyncio.wait_for(self._studio.changed.after(count), KEEPALIVE_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self.open -= 1


def add_routes(app: FastAPI, studio: Studio) -> None:
    """Put the routes onto the parent app; before Gradio is mounted at its root."""
    router = APIRouter()
    feed = EventFeed(studio)

    @router.get("/livez")
    async def livez() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok\n")

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 when a video could be made now, else 503 with the reasons."""
        health = studio.health()
        return JSONResponse(health, status_code=200 if health["ok"] else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        text = await asyncio.to_thread(studio.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/events")
    async def events() -> StreamingResponse:
        """The live state as server-sent events."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(feed.stream(), media_type="text/event-stream", headers=headers)

    @router.api_route("/files/{job_id}", methods=["GET", "HEAD"])
    async def video(job_id: str, download: bool = False) -> FileResponse:
        """The job's MP4; answers Range."""
        path = studio.media.video_path(found(studio, job_id)["id"])
        return file_response(path, "video/mp4", download)

    @router.api_route("/files/{job_id}/poster", methods=["GET", "HEAD"])
    async def poster(job_id: str) -> FileResponse:
        """The job's poster."""
        path = studio.media.poster_path(found(studio, job_id)["id"])
        return file_response(path, "image/webp", False)

    app.include_router(router)


def explain_bad_calls(app: FastAPI) -> None:
    """Answer a call by name that does not fit its endpoint with what is wrong, not with 500.

    Gradio's `/call/v2/<name>` lets the errors of its own argument check through.
    """

    async def explain(request: Request, error: Exception) -> Response:
        if "/gradio_api/call/v2/" not in request.url.path:
            raise error
        if isinstance(error, KeyError):
            return JSONResponse({"detail": f"no endpoint is named {error.args[0]}"}, 404)
        return JSONResponse({"detail": str(error)}, 422)

    for route in app.routes:
        if isinstance(route, Mount) and isinstance(route.app, FastAPI):
            for kind in (KeyError, TypeError):
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
