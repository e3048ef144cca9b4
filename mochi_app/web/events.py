"""`GET /events`: live state as server-sent events, to each page only what it asked for.

`?jobs=ID,ID` names the jobs that a page shows, `&pictures=ID` those whose live picture it shows.
The first event has their full views, each later one what has changed:

    {"now": 812.4, "pending": 1000, "held": 0, "processing": 1, "listed": 1001, "marked": 7,
     "slots": […], "jobs": […], "pictures": {ID: data URL}}

`listed` grows when a job is added, removed, or moved to the trash or back, `marked` when any job's
status or star changes: a page that lists jobs then reloads the list. `slots` is present when it has
changed. An entry of `jobs` is a job's whole progress, or its full view, which has a `prompt`, when
more than that has changed; `gone` means that there is no such job, or no longer. `as_of` is when an
`eta_seconds` was true on the clock of `now`: it is not sent again while it merely counts down.

Without `jobs` the page gets the progress of all running jobs. With `hidden=true`, for a background
tab, the stream ends after its first event and says when to reconnect: a browser has few connections
per server, and such tabs hold none. Each event has the current state: a job that changes twice
between two events is sent once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mochi_app.jobs import JOB_ID, Job, JobStatus
from mochi_app.request import refuse
from mochi_app.slots.pool import SupervisedSlot
from mochi_app.studio.live import PROGRESS, is_news
from mochi_app.studio.studio import Studio

EVENT_SECONDS = 0.2  # minimum between two events of a page
SECONDS_A_PAGE = 0.0005  # added to it for each connected page
PAGE_BYTES = 10_000  # per second and page, at most
BURST_SECONDS = 1.0  # of these bytes may be sent at once
MOST_PAUSE = 2.0  # seconds without an event, after a long one
KEEPALIVE_SECONDS = 15.0
HIDDEN_SECONDS = 15  # between two reconnects of a background tab
MOST_NAMED = 64  # jobs; a page of the history shows 24, the panel two
MOST_STREAMS = 768  # pages that may be connected at a time
STREAMS_OF_ADDRESS = 256  # of them, from one address
RETRY_SECONDS = 10  # after which a refused page may retry
PIECE_BYTES = 1 << 16  # written at a time: a page that does not read holds no more than two
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
SLOT_FIELDS = ("slot", "state", "detail", "job_id")


@dataclass(frozen=True)
class Wanted:
    """What a page asks for; `jobs` is None for all running jobs."""

    jobs: tuple[str, ...] | None = None
    pictures: frozenset[str] = frozenset()
    hidden: bool = False

    @classmethod
    def parse(
        cls, jobs: Sequence[str] | None, pictures: Sequence[str] | None, hidden: bool
    ) -> Wanted:
        """From query parameters, each a list of comma-separated ids.

        Raises:
            RequestError: a value is not such a list, or there are too many ids.
        """
        named = None if jobs is None else parse_ids("jobs", jobs)
        shown = parse_ids("pictures", pictures or ())
        if unknown := [job_id for job_id in shown if job_id not in (named or ())]:
            raise refuse("pictures", unknown[0], "ids that jobs names, too")
        return cls(named, frozenset(shown), hidden)


def parse_ids(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """The ids of a query parameter, each once.

    Raises:
        RequestError: one is not an id, or there are too many.
    """
    expected = f"at most {MOST_NAMED} ids of jobs, with commas between them"
    found = dict.fromkeys(part for value in values for part in value.split(",") if part)
    if len(found) > MOST_NAMED:
        raise refuse(name, f"{len(found)} ids", expected)
    for job_id in found:
        if not JOB_ID.fullmatch(job_id):
            raise refuse(name, job_id, expected)
    return tuple(found)


@dataclass
class Part:
    """A piece of JSON that is sent to many pages, and the look (by number) that last changed it."""

    text: bytes = b""
    changed_at: int = 0

    def put(self, value: Any, look: int) -> None:
        """Set the newest value."""
        text = orjson.dumps(value)
        if text != self.text:
            self.text, self.changed_at = text, look


class JobFeed:
    """One job as it is sent to pages, serialised once for all of them."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.pages = 0  # pages that named it
        self.gone = False
        self.record, self.progress, self.picture = Part(), Part(), Part()
        self._ended: tuple[Job, bool] | None = None  # the ended job as sent, whether it has a video
        self._progress: dict[str, Any] = {"eta_seconds": None}
        self._as_of = 0.0
        self._view, self._viewed_at = b"", -1  # both merged, as of this look

    def update(self, job: Job | None, studio: Studio, look: int, now: float) -> None:
        """Update to the state at look number `look`; `job` is None if it is gone."""
        self.gone = job is None
        if job is None:
            self._ended, self.picture = None, Part()
            self._take({"id": self.job_id, "gone": True, "eta_seconds": None}, look, now)
            self.record.put({}, look)
            return
        if image := studio.live.image(job.id):
            self.picture.put(image, look)
        elif self.picture.text:
            self.picture = Part()
        ended = (job, studio.media.has_video(job.id)) if job.status.terminal else None
        if ended and ended == self._ended:
            return
        self._ended = ended
        view = studio.view(job)
        self._take({name: view.pop(name) for name in PROGRESS}, look, now)
        self.record.put(view, look)

    def _take(self, progress: dict[str, Any], look: int, now: float) -> None:
        if is_news(self._progress, progress, now - self._as_of):
            self._progress, self._as_of = progress, now
            self.progress.put(progress | {"as_of": round(now, 1)}, look)

    def news(self, since: int) -> bytes:
        """What has changed since a look, as a JSON object; empty if nothing has."""
        latest = max(self.record.changed_at, self.progress.changed_at)
        if self.record.changed_at <= since:
            return self.progress.text if latest > since else b""
        if self._viewed_at < latest:
            members = (text[1:-1] for text in (self.progress.text, self.record.text))
            self._view = b"{%b}" % b",".join(filter(None, members))
            self._viewed_at = latest
        return self._view


class EventFeed:
    """The live state: read once for all pages, each of which is sent what it named.

    No address may hold more than a third of the streams: a client may have an IPv4 and an IPv6
    address, and leaves a third to the others. The limit is 256, not fewer, because behind a proxy
    that is not trusted (`MOCHI_TRUSTED_PROXIES`) everybody has the same address: fifty people with
    five tabs each.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._open: Counter[str] = Counter()  # connected pages, by address
        self._jobs: dict[str, JobFeed] = {}  # jobs that are named or running
        self._counts, self._slots = Part(), Part()
        self._began = time.monotonic()
        self._looks = 0
        self._looked_at = -math.inf
        self._beats = -1  # the count of `studio.changed` at the last look

    @property
    def _interval(self) -> float:
        """Seconds between two events of a page."""
        return max(EVENT_SECONDS, self._open.total() * SECONDS_A_PAGE)

    @contextlib.contextmanager
    def seat(self, address: str) -> Iterator[None]:
        """Reserve one of the streams.

        Raises:
            HTTPException: none is left for this address (429) or for anybody (503).
        """
        later = {"retry-after": str(RETRY_SECONDS)}
        if self._open[address] >= STREAMS_OF_ADDRESS:
            detail = (
                f"{STREAMS_OF_ADDRESS} pages of your address listen already: close some of them"
            )
            raise HTTPException(429, detail, later)
        if self._open.total() >= MOST_STREAMS:
            raise HTTPException(503, f"{MOST_STREAMS} pages listen already: try again later", later)
        self._open[address] += 1
        try:
            yield
        finally:
            self._open -= Counter([address])

    @contextlib.contextmanager
    def naming(self, wanted: Wanted) -> Iterator[None]:
        """Keep the jobs that a page names up to date while it is connected."""
        named = wanted.jobs or ()
        for job_id in named:
            feed = self._jobs.get(job_id)
            if feed is None:
                feed = self._jobs[job_id] = JobFeed(job_id)
                feed.update(self._job(job_id), self._studio, self._looks, self._now)
            feed.pages += 1
        try:
            yield
        finally:
            for job_id in named:
                self._jobs[job_id].pages -= 1

    @property
    def _now(self) -> float:
        """Seconds on the clock that times in events refer to."""
        return time.monotonic() - self._began

    def _look(self) -> None:
        """Read what has changed, unless that was just done; also without a beat, as ETAs age."""
        studio, now = self._studio, self._now
        age = now - self._looked_at
        changed = studio.changed.count != self._beats
        if not (age >= 1 or (changed and age >= self._interval / 2)):
            return
        self._looked_at, self._beats = now, studio.changed.count
        self._looks += 1
        alive = studio.live.jobs.keys()
        for job_id in alive - self._jobs.keys():
            self._jobs[job_id] = JobFeed(job_id)
        for feed in list(self._jobs.values()):
            if feed.pages or feed.job_id in alive:
                feed.update(self._job(feed.job_id), studio, self._looks, now)
            else:
                del self._jobs[feed.job_id]
        history = studio.history
        held = history.held()
        counts = {
            "pending": history.count(JobStatus.PENDING) - held,
            "held": held,
            "processing": history.count(JobStatus.PROCESSING),
            "listed": history.revisions.listed,
            "marked": history.revisions.marked,
        }
        self._counts.put(counts, self._looks)
        self._slots.put([self._slot(supervised) for supervised in studio.pool.slots], self._looks)

    def _slot(self, supervised: SupervisedSlot) -> dict[str, Any]:
        """A slot as pages show it; a countdown is sent as a time, which does not change."""
        slot = supervised.describe()
        at = supervised.retry_at
        retry = {"retry_at": None if at is None else round(at - self._began, 1)}
        return {name: slot[name] for name in SLOT_FIELDS} | retry

    def _job(self, job_id: str) -> Job | None:
        """The job, unless it is in the trash."""
        job = self._studio.history.get(job_id)
        return job if job is not None and job.deleted_at is None else None

    def _feeds_of(self, wanted: Wanted) -> list[JobFeed]:
        """The jobs that are sent to a page. Jobs that its caller may not see, if there were any,
        would be left out here."""
        if wanted.jobs is not None:
            return [self._jobs[job_id] for job_id in wanted.jobs]
        alive = (self._jobs.get(job_id) for job_id in self._studio.live.jobs)
        return [feed for feed in alive if feed is not None and not feed.gone]

    def _event(self, wanted: Wanted, since: int) -> bytes:
        """What has changed since a look for one page, as an event; empty if nothing has."""
        feeds = self._feeds_of(wanted)
        if wanted.jobs is None:
            parts = (one.progress for one in feeds)
            jobs = [part.text for part in parts if part.changed_at > since]
        else:
            jobs = [text for one in feeds if (text := one.news(since))]
        pictures = [
            b'"%b":%b' % (one.job_id.encode(), one.picture.text)
            for one in feeds
            if one.job_id in wanted.pictures and one.picture.changed_at > since and one.picture.text
        ]
        slots = self._slots.text if self._slots.changed_at > since else b""
        if not (jobs or pictures or slots or self._counts.changed_at > since):
            return b""
        return self._head + b"".join(
            (
                b',"slots":%b' % slots if slots else b"",
                b',"jobs":[%b]' % b",".join(jobs),
                b',"pictures":{%b}' % b",".join(pictures) if pictures else b"",
                b"}\n\n",
            )
        )

    @property
    def _head(self) -> bytes:
        """The beginning of every event."""
        return b'data: {"now":%.1f,%b' % (self._now, self._counts.text[1:-1])

    async def stream(self, wanted: Wanted) -> AsyncIterator[bytes]:
        """Server-sent events until the client or the server is gone. Inside `naming(wanted)`."""
        if wanted.hidden:
            yield b"retry: %d\n" % (HIDDEN_SECONDS * 1000)
        since, spoke_at, free_at = -1, -math.inf, 0.0
        while not self._studio.stopping:
            self._look()
            seen, beats = self._looks, self._beats
            event = self._event(wanted, since)
            since = seen
            if not event and time.monotonic() - spoke_at >= KEEPALIVE_SECONDS:
                event = self._head + b',"jobs":[]}\n\n'
            pause = self._interval
            if event:
                for start in range(0, len(event), PIECE_BYTES):
                    yield event[start : start + PIECE_BYTES]
                if wanted.hidden:
                    return
                spoke_at = time.monotonic()
                free_at = max(free_at, spoke_at) + len(event) / PAGE_BYTES
                free_at = min(free_at, spoke_at + BURST_SECONDS + MOST_PAUSE)
                pause = max(pause, free_at - spoke_at - BURST_SECONDS)
            await asyncio.sleep(pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(spoke_at + KEEPALIVE_SECONDS - time.monotonic()):
                    await self._studio.changed.after(beats)


class Listening(StreamingResponse):
    """The stream of a feed. It holds its seat from before its first byte until its client is gone,
    so that pages that connect at the same moment are counted one by one."""

    def __init__(
        self,
        feed: EventFeed,
        address: str,
        wanted: Wanted,
    ) -> None:
        super().__init__(
            feed.stream(wanted), media_type="text/event-stream", headers=STREAM_HEADERS
        )
        self._feed = feed
        self._address = address
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.seat(self._address), self._feed.naming(self._wanted):
            await super().__call__(scope, receive, send)
