"""`GET /events`: live state as server-sent events, each page told what it named and no more.

`?jobs=ID,ID` names the jobs that a page shows, `&pictures=ID` those of which it shows the picture
so far. Its first event has the full views of these, each later one what has changed:

    {"now": 812.4, "pending": 1000, "held": 0, "processing": 1, "listed": 1001, "marked": 7,
     "slots": […], "jobs": […], "pictures": {ID: data URL}}

`listed` grows when a job comes, goes, or goes to the trash and back, `marked` when any job's status
or star changes: a page that lists jobs asks again. `slots` is there when it has changed. An entry
of `jobs` is a job's whole progress, or its full view, which has a `prompt`, when more than that has
changed; `gone` says that there is no such job (any more). `as_of` is when an `eta_seconds` was true
on the clock of `now`: it is not told again while it runs down with the time.

Without `jobs` one hears of the progress of whatever runs. With `hidden=true`, for a tab that nobody
looks at, the stream ends after its first event and says when to ask again: a browser has few
connections for one server, and such tabs hold none. Each event tells the state as it is by then: a
job that changes twice between two of them is told of once.
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

EVENT_SECONDS = 0.2  # at most so often a page hears of changes
SECONDS_A_PAGE = 0.0005  # more, for each page that listens
PAGE_BYTES = 10_000  # a second and page, whatever happens
BURST_SECONDS = 1.0  # of these bytes may come at once
MOST_PAUSE = 2.0  # seconds without an event, after a long one
KEEPALIVE_SECONDS = 15.0
HIDDEN_SECONDS = 15  # between two looks of a page that nobody sees
MOST_NAMED = 64  # jobs; a page of the history shows 24, the panel two
MOST_STREAMS = 768  # pages that may listen at a time
STREAMS_OF_ADDRESS = 256  # of them, from one address
RETRY_SECONDS = 10  # after which a page that was sent away may ask again
PIECE_BYTES = 1 << 16  # written at a time: a page that does not read holds no more than two
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
SLOT_FIELDS = ("slot", "state", "detail", "job_id")


@dataclass(frozen=True)
class Wanted:
    """What a page asks to hear of; `jobs` is None for whatever runs."""

    jobs: tuple[str, ...] | None = None
    pictures: frozenset[str] = frozenset()
    hidden: bool = False

    @classmethod
    def parse(
        cls, jobs: Sequence[str] | None, pictures: Sequence[str] | None, hidden: bool
    ) -> Wanted:
        """From query parameters, each a list of ids with commas between them.

        Raises:
            RequestError: that is not what was given, or they are too many.
        """
        named = None if jobs is None else parse_ids("jobs", jobs)
        shown = parse_ids("pictures", pictures or ())
        if unknown := [job_id for job_id in shown if job_id not in (named or ())]:
            raise refuse("pictures", unknown[0], "ids that jobs names, too")
        return cls(named, frozenset(shown), hidden)


def parse_ids(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """The ids of a query parameter, each once.

    Raises:
        RequestError: one has not the form of an id, or they are too many.
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
    """A piece of JSON that is sent to many, and the look at which it last changed."""

    text: bytes = b""
    changed_at: int = 0

    def put(self, value: Any, look: int) -> None:
        """Take over the newest value."""
        text = orjson.dumps(value)
        if text != self.text:
            self.text, self.changed_at = text, look


class Told:
    """One job as pages are told of it, serialised once for all of them."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.pages = 0  # that named it
        self.gone = False
        self.record, self.progress, self.picture = Part(), Part(), Part()
        self._ended: tuple[Job, bool] | None = None  # the ended job that is told, its video there
        self._progress: dict[str, Any] = {"eta_seconds": None}
        self._as_of = 0.0
        self._view, self._viewed_at = b"", -1  # both as one, as of this look

    def look(self, job: Job | None, studio: Studio, look: int, now: float) -> None:
        """See what has changed by the look of that number; `job` is None when it is gone."""
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
        """What has changed after a look, as a JSON object; nothing if nothing has."""
        latest = max(self.record.changed_at, self.progress.changed_at)
        if self.record.changed_at <= since:
            return self.progress.text if latest > since else b""
        if self._viewed_at < latest:
            members = (text[1:-1] for text in (self.progress.text, self.record.text))
            self._view = b"{%b}" % b",".join(filter(None, members))
            self._viewed_at = latest
        return self._view


class EventFeed:
    """The live state: looked at once for all pages, each of which is sent what it named.

    No address has more than a third of the pages that may listen: a client has one of IPv4 and one
    of IPv6, and leaves a third to the others. That is 256, not fewer, as behind a proxy that is not
    trusted (`MOCHI_TRUSTED_PROXIES`) everybody has one address: fifty people with five tabs each.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._open: Counter[str] = Counter()  # pages that listen, by address
        self._told: dict[str, Told] = {}  # jobs that are named or run
        self._counts, self._slots = Part(), Part()
        self._began = time.monotonic()
        self._looks = 0
        self._looked_at = -math.inf
        self._beats = -1  # of `studio.changed`, that the last look has seen

    @property
    def _interval(self) -> float:
        """Seconds between two events of a page."""
        return max(EVENT_SECONDS, self._open.total() * SECONDS_A_PAGE)

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

    @contextlib.contextmanager
    def naming(self, wanted: Wanted) -> Iterator[None]:
        """Have the jobs that a page names looked at, as long as it listens."""
        named = wanted.jobs or ()
        for job_id in named:
            told = self._told.get(job_id)
            if told is None:
                told = self._told[job_id] = Told(job_id)
                told.look(self._job(job_id), self._studio, self._looks, self._now)
            told.pages += 1
        try:
            yield
        finally:
            for job_id in named:
                self._told[job_id].pages -= 1

    @property
    def _now(self) -> float:
        """Seconds on the clock by which pages are told of times."""
        return time.monotonic() - self._began

    def _look(self) -> None:
        """See what has changed, unless somebody has just looked: ETAs age without a word."""
        studio, now = self._studio, self._now
        age = now - self._looked_at
        changed = studio.changed.count != self._beats
        if not (age >= 1 or (changed and age >= self._interval / 2)):
            return
        self._looked_at, self._beats = now, studio.changed.count
        self._looks += 1
        alive = studio.live.jobs.keys()
        for job_id in alive - self._told.keys():
            self._told[job_id] = Told(job_id)
        for told in list(self._told.values()):
            if told.pages or told.job_id in alive:
                told.look(self._job(told.job_id), studio, self._looks, now)
            else:
                del self._told[told.job_id]
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
        """A slot as pages show it; what counts down is told as a time, so as not to change."""
        slot = supervised.describe()
        at = supervised.retry_at
        retry = {"retry_at": None if at is None else round(at - self._began, 1)}
        return {name: slot[name] for name in SLOT_FIELDS} | retry

    def _job(self, job_id: str) -> Job | None:
        """The job, unless it is in the trash."""
        job = self._studio.history.get(job_id)
        return job if job is not None and job.deleted_at is None else None

    def _told_to(self, wanted: Wanted) -> list[Told]:
        """The jobs that a page is told of. Were there some that its caller may not see, they would
        be left out here."""
        if wanted.jobs is not None:
            return [self._told[job_id] for job_id in wanted.jobs]
        alive = (self._told.get(job_id) for job_id in self._studio.live.jobs)
        return [told for told in alive if told is not None and not told.gone]

    def _event(self, wanted: Wanted, since: int) -> bytes:
        """What has changed after a look for one page, as an event; nothing if nothing has."""
        told = self._told_to(wanted)
        if wanted.jobs is None:
            parts = (one.progress for one in told)
            jobs = [part.text for part in parts if part.changed_at > since]
        else:
            jobs = [text for one in told if (text := one.news(since))]
        pictures = [
            b'"%b":%b' % (one.job_id.encode(), one.picture.text)
            for one in told
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
        """The beginning of an event, which every one has."""
        return b'data: {"now":%.1f,%b' % (self._now, self._counts.text[1:-1])

    async def stream(self, wanted: Wanted) -> AsyncIterator[bytes]:
        """Server-sent events until the client or the server goes. Inside `naming(wanted)`."""
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
    """The stream of a feed. It has its seat from before its first byte until its client is gone,
    so that pages which come in one moment are counted one by one."""

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
