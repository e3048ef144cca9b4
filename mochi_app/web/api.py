"""The named endpoints, through `gr.api`: thin, typed, documented. All rules are the studio's.

Every function here becomes part of `/gradio_api/info`; its parameter names are a promise. Values
are checked by the studio, so the annotations describe and do not enforce.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, get_type_hints

import gradio as gr
from gradio import FileData

from mochi_app.disk_errors import reason_of
from mochi_app.errors import HistoryError
from mochi_app.jobs import JobStatus
from mochi_app.parameters import ASKED, GenerationRequest
from mochi_app.request import RequestError
from mochi_app.studio.studio import Studio
from mochi_app.web.auth import caller_of
from mochi_app.web.tickets import ENDPOINT, SECRET_HEADER

WATCHER_SECONDS = 0.01  # of pause between two answers to one caller, for each who waits


class Refused(gr.Error):
    """A refusal that reaches the caller word for word, without a traceback in the log."""

    def __init__(self, error: Exception | str) -> None:
        super().__init__(str(error), print_exception=False)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Hand what the studio refuses, and a store that cannot be written, to the caller."""
    try:
        yield
    except (RequestError, HistoryError) as error:
        raise Refused(error) from None


def takes_parameters(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`endpoint(self, request, **given)` with a signature and an Args section that have each
    parameter of a request, as Gradio reads them for the API."""
    hints = get_type_hints(GenerationRequest)
    own = list(inspect.signature(endpoint).parameters.values())[:2]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, positional, annotation=hints[name])
        if declared.omitted is None
        else inspect.Parameter(name, positional, default=None, annotation=hints[name] | None)
        for name, declared in ASKED.items()
    ]
    returned = get_type_hints(endpoint)["return"]
    signature = inspect.Signature([*own, *parameters], return_annotation=returned)

    if inspect.isasyncgenfunction(endpoint):

        @functools.wraps(endpoint)
        async def described(*args: Any, **kwargs: Any) -> Any:
            async for item in endpoint(**signature.bind(*args, **kwargs).arguments):
                yield item
    else:

        @functools.wraps(endpoint)
        async def described(*args: Any, **kwargs: Any) -> Any:
            return await endpoint(**signature.bind(*args, **kwargs).arguments)

    described.__signature__ = signature  # type: ignore[attr-defined]
    described.__annotations__ = {one.name: one.annotation for one in parameters} | {
        "request": gr.Request,
        "return": returned,
    }
    lines = [f"    {name}: {declared.help}" for name, declared in ASKED.items()]
    described.__doc__ = "\n".join([inspect.getdoc(endpoint) or "", "", "Args:", *lines])
    return described


class Api:
    """The endpoints over one studio. Methods carry the names and signatures that callers see."""

    def __init__(self, studio: Studio, ticket_secret: str) -> None:
        self._studio = studio
        self._ticket_secret = ticket_secret
        self._watchers = 0

    def mount(self) -> None:
        """Declare the endpoints; inside a `gr.Blocks` context."""
        named: tuple[Callable[..., Any], ...] = (
            self.submit_job,
            self.enhance_job,
            self.get_job_status,
            self.list_jobs,
            self.get_output_file,
            self.cancel_job,
            self.retry_job,
            self.delete_job,
            self.restore_job,
            self.star_job,
            self.generate,
        )
        for function in named:
            gr.api(function, api_name=function.__name__, concurrency_limit=None)
        gr.api(
            self.engine_turn,
            api_name=ENDPOINT,
            api_visibility="undocumented",
            concurrency_limit=len(self._studio.pool.slots),
        )

    @takes_parameters
    async def submit_job(self, request: gr.Request, **given: Any) -> dict[str, Any]:
        """Ask for a video; returns the job at once, its id in `id`. The job is kept whatever
        happens to the caller. The same `request_id` again returns the same job."""
        with refusals():
            job = await self._studio.submit(owner=caller_of(request).name, **given)
        return self._studio.view(job)

    async def enhance_job(self, job_id: str, request: gr.Request) -> dict[str, Any]:
        """Ask for the many-step version of a finished preview: same prompt, seed and size.

        Args:
            job_id: The preview's id.
        """
        with refusals():
            job = await self._studio.enhance(job_id, owner=caller_of(request).name)
        return self._studio.view(job)

    async def get_job_status(self, job_id: str) -> dict[str, Any]:
        """The job with `status`, `step` of `steps`, `position` in the queue and `eta_seconds`; with
        `held` it is PENDING until somebody tries it again, as `held` says.

        Args:
            job_id: The id that submit_job returned.
        """
        with refusals():
            return self._studio.status(job_id)

    async def list_jobs(
        self,
        status: str | None = None,
        query: str | None = None,
        page: int = 1,
        page_size: int = 24,
    ) -> dict[str, Any]:
        """Jobs of everybody, newest first: `jobs`, `total`, `page`, `page_size`.

        Args:
            status: PENDING, PROCESSING, COMPLETED, FAILED or CANCELLED; all when omitted.
            query: Words of the prompt; the last one may be a beginning.
            page: From 1.
            page_size: 1 to 100.
        """
        with refusals():
            return self._studio.list_jobs(
                status=status, query=query, page=page, page_size=page_size
            )

    async def get_output_file(self, job_id: str) -> FileData:
        """The finished MP4; prompt, seed and all parameters are in its metadata.

        Args:
            job_id: The id of a COMPLETED job.
        """
        with refusals():
            return self._file(self._studio.status(job_id))

    async def cancel_job(self, job_id: str, request: gr.Request) -> dict[str, Any]:
        """Stop a job, waiting or running. One that has ended is returned as it is. A job of
        somebody else's is only theirs, or an admin's, to stop.

        Args:
            job_id: The job's id.
        """
        with refusals():
            return self._studio.view(await self._studio.cancel(job_id, by=caller_of(request)))

    async def retry_job(self, job_id: str, request: gr.Request) -> dict[str, Any]:
        """Try a job again: one that is held (`held` says why), which is only its owner's, or an
        admin's, to do. For one that has failed or was cancelled, the answer is a new job of yours
        with the same parameters.

        Args:
            job_id: The job's id.
        """
        with refusals():
            return self._studio.view(await self._studio.retry(job_id, by=caller_of(request)))

    async def delete_job(self, job_id: str, request: gr.Request) -> dict[str, Any]:
        """Put an ended job and its files into the trash, where it can be restored for a while. A
        job of somebody else's is only theirs, or an admin's, to delete.

        Args:
            job_id: The job's id.
        """
        with refusals():
            return self._studio.view(await self._studio.delete(job_id, by=caller_of(request)))

    async def restore_job(self, job_id: str, request: gr.Request) -> dict[str, Any]:
        """Take a job and its files out of the trash again. One that is not in it is returned as it
        is. A job of somebody else's is only theirs, or an admin's, to restore.

        Args:
            job_id: The job's id.
        """
        with refusals():
            return self._studio.view(await self._studio.restore(job_id, by=caller_of(request)))

    async def star_job(self, job_id: str, starred: bool = True) -> dict[str, Any]:
        """Star a job, so that its video is never evicted; or take the star away.

        Args:
            job_id: The job's id.
            starred: true or false.
        """
        with refusals():
            return self._studio.view(await self._studio.star(job_id, starred))

    @takes_parameters
    async def generate(self, request: gr.Request, **given: Any) -> AsyncIterator[FileData]:
        """Ask for a video and wait for it. Streams the job as it advances, then the MP4. Parameters
        as in submit_job; a caller that goes away can find the job in list_jobs."""
        most = self._studio.settings.max_watchers
        if self._watchers >= most:
            raise Refused(f"{most} callers wait already: use submit_job and get_job_status")
        self._watchers += 1
        try:
            job = await self.submit_job(request, **given)
            async for item in self._progress(job["id"]):
                yield item
        finally:
            self._watchers -= 1

    async def _progress(self, job_id: str) -> AsyncIterator[Any]:
        progress = gr.Progress()
        with refusals():
            interval = max(0.5, WATCHER_SECONDS * self._watchers)
            async for view in self._studio.watch(job_id, interval):
                if JobStatus(view["status"]).terminal:
                    break
                if view["held"]:  # it may be so for ever
                    raise Refused(f"job {job_id} is held: {view['held']}")
                progress((view["step"], view["steps"]), desc=describe(view), unit="steps")
                yield view
            else:
                raise Refused(f"the server is stopping; job {job_id} goes on after its restart")
            if view["status"] != JobStatus.COMPLETED:
                raise Refused(f"job {job_id} is {view['status']}: {view['error'] or 'no video'}")
            yield self._file(view)

    def _file(self, view: dict[str, Any]) -> FileData:
        """The MP4 as Gradio's clients expect a file. Raises RequestError when there is none."""
        if view["status"] != JobStatus.COMPLETED:
            raise RequestError(f"job_id: job {view['id']} is {view['status']}: it has no video")
        try:
            path = self._studio.media.video_path(view["id"])
        except OSError as error:
            raise RequestError(
                f"job_id: the video of job {view['id']} cannot be read now: {reason_of(error)}"
            ) from error
        if path is None:
            why = "was evicted by the quota" if view["evicted_at"] else "is gone from the disk"
            raise RequestError(f"job_id: the video of job {view['id']} {why}")
        return FileData(path=str(path), orig_name=path.name, mime_type="video/mp4")

    async def engine_turn(self, request: gr.Request) -> str | None:
        """One turn at a slot, for the app's own tickets."""
        given = request.headers.get(SECRET_HEADER, "")
        if not hmac.compare_digest(given.encode(), self._ticket_secret.encode()):
            raise Refused("engine_turn is the app's own: use submit_job")
        return await self._studio.dispatch.engine_turn()


def describe(view: dict[str, Any]) -> str:
    """One line about a job that has not ended."""
    if view["status"] == JobStatus.PROCESSING:
        return f"{view['stage'] or 'starting'}, step {view['step']} of {view['steps']}"
    place = f"place {view['position']} in the queue" if view["position"] else "waiting"
    eta = view["eta_seconds"]
    return place if eta is None else f"{place}, about {eta:.0f} s"
