"""Plain HTTP routes besides Gradio's: probes, metrics, live events, files.

A file is found by its job's id alone; no path is ever taken from a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from gradio.route_utils import FnIndexInferError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Mount

from mochi_app.disk_errors import reason_of
from mochi_app.jobs import JOB_ID, JobStatus
from mochi_app.request import NotFound, RequestError
from mochi_app.studio.studio import Studio
from mochi_app.web.auth import is_stranger
from mochi_app.web.events import RETRY_SECONDS, STREAM_HEADERS, EventFeed, Listening, Wanted
from mochi_app.web.hosts import UNSERVED
from mochi_app.web.throttle import address_of

log = logging.getLogger(__name__)

OPENLY = ("slot", "state")  # the fields of a slot that /healthz shows without a login
READS = ["GET", "HEAD"]  # the server omits the body for HEAD


def add_routes(app: FastAPI, studio: Studio) -> None:
    """Add the routes to the parent app, before Gradio is mounted at its root."""
    router = APIRouter()
    feed = EventFeed(studio)

    @router.api_route("/livez", methods=READS)
    async def livez() -> PlainTextResponse:
        """200 while the process responds."""
        return PlainTextResponse("ok\n")

    @router.api_route("/healthz", methods=READS)
    async def healthz(request: Request) -> JSONResponse:
        """200 if a video can be made now, else 503 with the reasons. Without a required login, or
        for a host that is not served, only the state of each slot is shown."""
        health = studio.health()
        if is_stranger(request) or UNSERVED in request.scope:
            health["slots"] = [{name: slot[name] for name in OPENLY} for slot in health["slots"]]
        return JSONResponse(health, status_code=200 if health["ok"] else 503)

    @router.api_route("/metrics", methods=READS)
    async def metrics() -> Response:
        """Metrics as Prometheus text."""
        text = await asyncio.to_thread(studio.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/events")
    async def events(
        request: Request,
        jobs: Annotated[list[str] | None, Query()] = None,
        pictures: Annotated[list[str] | None, Query()] = None,
        hidden: bool = False,
    ) -> Listening:
        """The live state as server-sent events (`events.py`); 400 for invalid parameters, 429 or
        503 if too many pages are connected."""
        try:
            wanted = Wanted.parse(jobs, pictures, hidden)
        except RequestError as error:
            raise HTTPException(400, str(error)) from None
        return Listening(feed, address_of(request), wanted)

    @router.head("/events")
    async def events_head() -> Response:
        """The headers of the stream, without reserving one."""
        return Response(media_type="text/event-stream", headers=STREAM_HEADERS)

    @router.api_route("/files/{job_id}", methods=READS)
    async def video(job_id: str, download: bool = False) -> FileResponse:
        """The job's MP4; supports Range."""
        view = found(studio, job_id)
        with disk_errors():
            path = studio.media.video_path(job_id)
        if path is None and view["evicted_at"] is None:
            log.error("job %s: its video is gone from the disk", job_id)
            studio.changed.beat()  # its view has changed
        return file_response(path, "video/mp4", download)

    @router.api_route("/files/{job_id}/poster", methods=READS)
    async def poster(job_id: str) -> FileResponse:
        """The job's poster."""
        job_id = found(studio, job_id)["id"]
        with disk_errors():
            path = studio.media.poster_path(job_id)
        return file_response(path, "image/webp", False)

    @router.api_route("/gradio_api/file={path:path}", methods=READS)
    async def gradio_file(path: str) -> FileResponse:
        """A video by the path that Gradio's clients were given. The path is not opened: it names a
        job's video or nothing."""
        folder, _, name = path.rpartition("/")
        job_id = name.removesuffix(".mp4")
        if folder != str(studio.media.videos) or not JOB_ID.fullmatch(job_id):
            raise HTTPException(404, "no such file")
        return await video(job_id)

    app.include_router(router)


def explain_bad_calls(app: FastAPI) -> None:
    """Answer an invalid call of an endpoint with what is wrong, not with 500.

    Gradio's `/call/v2/<name>` does not handle the errors of its own argument check, and other
    routes not those of looking up a page by name, or a function or component by number.
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
    """Answer a disk error with HTTP 503 and its reason."""
    try:
        yield
    except OSError as error:
        detail = f"the file cannot be read now: {reason_of(error)}"
        raise HTTPException(503, detail, {"retry-after": str(RETRY_SECONDS)}) from error


def file_response(path: Any, media_type: str, download: bool) -> FileResponse:
    """The file, to be revalidated each time: a deleted one must not survive in a cache."""
    if path is None:
        raise HTTPException(404, "the file is not here any more")
    return FileResponse(
        path,
        media_type=media_type,
        filename=path.name,
        content_disposition_type="attachment" if download else "inline",
        headers={"cache-control": "private, no-cache"},
    )
