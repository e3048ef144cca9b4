"""The jobs in memory: lookup by id, search, filters and pages in well under a millisecond per 100k.

Every job has an *ordinal*, its place in the order of ids (which is the order of time). Two byte
columns hold status and flags by ordinal, and each word of a prompt has the ascending ordinals of
the jobs that use it, so that a query is a few NumPy passes over bytes and never a loop over jobs.
Nothing here touches the disk, and nothing locks: the event loop is the only caller.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
from numpy.typing import NDArray

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import check_integer, check_text, refuse

MAX_PAGE = 10**9
MAX_PAGE_SIZE = 100
MAX_QUERY_CHARS = 200

# Scripts written without spaces are searched by character, everything else by word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_AFTER_ALL = "\U0010ffff"

_STATUSES = tuple(JobStatus)
_STATUS_CODE = {status: code for code, status in enumerate(_STATUSES)}

MARKS = ("status", "starred", "held")  # fields that change and by which jobs are listed
# Flags of a job, one byte.
_GONE, _TRASHED, _STARRED, _ENHANCE, _VIDEO, _HELD = 1, 2, 4, 8, 16, 32

Bools = NDArray[np.bool_]
RequestKey = tuple[str, str]


def words(value: str) -> list[str]:
    """The words of a text, in order, normalised for search: NFKC, case folded."""
    folded = value.lower() if value.isascii() else unicodedata.normalize("NFKC", value).casefold()
    return _WORD.findall(folded)


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which jobs to list; None means any.

    Every word of `text` must be in the prompt, in any case; the last one may be a prefix of a word.
    `page` counts from 1. `deleted` lists the trash instead of the rest.

    Raises:
        RequestError: a field is out of range; the message names it.
    """

    status: frozenset[JobStatus] | None = None
    text: str = ""
    starred: bool | None = None
    kind: str | None = None
    held: bool | None = None
    deleted: bool = False
    page: int = 1
    page_size: int = 24

    def __post_init__(self) -> None:
        check_text("query", self.text, least=0, most=MAX_QUERY_CHARS)
        page = check_integer("page", self.page, least=1, most=MAX_PAGE)
        page_size = check_integer("page_size", self.page_size, least=1, most=MAX_PAGE_SIZE)
        object.__setattr__(self, "page", page)  # an integral float has become an int
        object.__setattr__(self, "page_size", page_size)
        if self.kind not in (None, "preview", "enhance"):
            raise refuse("kind", self.kind, "preview or enhance")


@dataclass(frozen=True, slots=True)
class JobPage:
    """One page of a listing, newest first. `total` counts the jobs of all pages."""

    jobs: tuple[Job, ...]
    total: int
    page: int
    page_size: int


@dataclass
class Revisions:
    """How often the listings changed since the start, for pages that show one: `listed` grows when
    a job is added or removed, or moved to the trash or back; `marked` when a status, a star or a
    hold changes."""

    listed: int = 0
    marked: int = 0


class JobIndex:
    """All jobs by ordinal, with what is needed to find them."""

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        """Build from `jobs`; fastest when they come in ascending order of id."""
        self.last_id: str | None = None
        self.revisions = Revisions()
        self._ids: list[str] = []
        self._jobs: list[Job | None] = []
        self._ordinals: dict[str, int] = {}
        self._status = bytearray()
        self._flags = bytearray()
        self._counts = [0] * len(_STATUSES)  # jobs by status code, without the trash
        self.held = 0  # jobs, without the trash
        self._uses: dict[str, array[int]] = {}  # word -> ascending ordinals
        self._vocabulary: list[str] | None = None  # sorted; None while building
        self._children: dict[str, list[str]] = {}  # parent id -> ascending ids
        self._requests: dict[RequestKey, str] = {}
        for job in jobs:
            self.put(job)
        self._vocabulary = sorted(self._uses)

    def __len__(self) -> int:
        return len(self._ordinals)

    def __iter__(self) -> Iterator[Job]:
        return (job for job in self._jobs if job is not None)

    def get(self, job_id: str) -> Job | None:
        """The job with this id, in the trash or not."""
        ordinal = self._ordinals.get(job_id)
        return None if ordinal is None else self._jobs[ordinal]

    def find_request(self, key: RequestKey) -> str | None:
        """Id of the job that (owner, request_id) made."""
        return self._requests.get(key)

    def children(self, job_id: str) -> list[Job]:
        """Jobs made from this one and not in the trash, oldest first."""
        found = [self.get(child) for child in self._children.get(job_id, ())]
        return [job for job in found if job is not None and job.deleted_at is None]

    # Changes

    def put(self, job: Job) -> None:
        """Add a new job, or update a known one (whose prompt has not changed)."""
        ordinal = self._ordinals.get(job.id)
        if ordinal is not None:
            self._revise(self._jobs[ordinal], job)
            self._jobs[ordinal] = job
            self._describe(ordinal, job)
            return
        self.revisions.listed += 1
        later = self._take_later(job.id)
        for item in (job, *later):
            self._append(item)
        if job.request_id is not None:
            self._requests[job.owner, job.request_id] = job.id
        if job.parent_id is not None:
            insort(self._children.setdefault(job.parent_id, []), job.id)
        self.last_id = max(job.id, self.last_id or "")

    def remove(self, job_id: str) -> None:
        """Remove a job. Its ordinal stays empty until the next start."""
        job = self.get(job_id)
        if job is None:
            return
        self.revisions.listed += 1
        ordinal = self._ordinals.pop(job_id)
        self._unlink(ordinal, job)
        self._count(ordinal, -1)
        self._jobs[ordinal] = None
        self._flags[ordinal] = _GONE
        if job.request_id is not None:
            self._requests.pop((job.owner, job.request_id), None)
        if job.parent_id is not None:
            siblings = self._children[job.parent_id]
            siblings.remove(job_id)
            if not siblings:
                del self._children[job.parent_id]

    def _revise(self, before: Job | None, after: Job) -> None:
        """Update `revisions` for a changed job."""
        if before is None or (before.deleted_at is None) != (after.deleted_at is None):
            self.revisions.listed += 1
        elif any(getattr(before, name) != getattr(after, name) for name in MARKS):
            self.revisions.marked += 1

    def _append(self, job: Job) -> None:
        """Give `job`, the newest of all, the next ordinal."""
        ordinal = len(self._ids)
        self._ids.append(job.id)
        self._jobs.append(job)
        self._ordinals[job.id] = ordinal
        self._status.append(0)
        self._flags.append(_GONE)
        self._describe(ordinal, job)
        for word in set(words(job.prompt)):
            uses = self._uses.get(word)
            if uses is None:
                uses = self._uses[word] = array("i")
                if self._vocabulary is not None:
                    insort(self._vocabulary, word)
            uses.append(ordinal)

    def _take_later(self, job_id: str) -> list[Job]:
        """Take out the jobs after `job_id`: a few at most, since ids are created in order."""
        later: list[Job] = []
        while self._ids and self._ids[-1] > job_id:
            job = self._jobs.pop()
            if job is not None:
                self._unlink(len(self._jobs), job)
                del self._ordinals[job.id]
                later.append(job)
            self._count(len(self._ids) - 1, -1)
            del self._ids[-1], self._status[-1], self._flags[-1]
        return later[::-1]

    def _unlink(self, ordinal: int, job: Job) -> None:
        """Remove `ordinal` from the words of `job`."""
        for word in set(words(job.prompt)):
            uses = self._uses[word]
            del uses[bisect_left(uses, ordinal)]
            if not uses:
                del self._uses[word]
                if self._vocabulary is not None:
                    del self._vocabulary[bisect_left(self._vocabulary, word)]

    def _describe(self, ordinal: int, job: Job) -> None:
        """Write the columns of a job."""
        self._count(ordinal, -1)
        self._status[ordinal] = _STATUS_CODE[job.status]
        self._flags[ordinal] = (
            (_TRASHED if job.deleted_at is not None else 0)
            | (_STARRED if job.starred else 0)
            | (_ENHANCE if job.enhanced else 0)
            | (_VIDEO if job.video is not None and job.evicted_at is None else 0)
            | (_HELD if job.held is not None else 0)
        )
        self._count(ordinal, 1)

    def _count(self, ordinal: int, by: int) -> None:
        """Add `by` to `counts` and `held` for a job that is neither removed nor in the trash."""
        if not self._flags[ordinal] & (_GONE | _TRASHED):
            self._counts[self._status[ordinal]] += by
            self.held += by if self._flags[ordinal] & _HELD else 0

    # Questions

    def page(self, query: JobQuery) -> JobPage:
        """One page of the jobs that `query` describes, newest first."""
        fit = self._fit(
            starred=query.starred, kind=query.kind, held=query.held, trashed=query.deleted
        )
        if query.status is not None:
            fit &= self._has_status(query.status)
        if query.text.strip():
            fit &= self._uses_words(words(query.text))
        hits = np.flatnonzero(fit)
        end = max(0, len(hits) - (query.page - 1) * query.page_size)
        start = max(0, end - query.page_size)
        jobs = tuple(reversed(self._at(hits[start:end])))
        return JobPage(jobs=jobs, total=len(hits), page=query.page, page_size=query.page_size)

    def with_status(self, *statuses: JobStatus) -> list[Job]:
        """Jobs in one of these states and not in the trash, oldest first."""
        return self._at(np.flatnonzero(self._fit() & self._has_status(statuses)))

    def trashed(self) -> list[Job]:
        """Jobs in the trash, oldest first."""
        return self._at(np.flatnonzero(self._fit(trashed=True)))

    def evictable(self, limit: int | None = None) -> list[Job]:
        """Completed, unstarred jobs that have a video and are not in the trash, oldest first."""
        fit = self._fit(starred=False, video=True) & self._has_status((JobStatus.COMPLETED,))
        return self._at(np.flatnonzero(fit)[:limit])

    def counts(self) -> dict[JobStatus, int]:
        """Jobs by status, without the trash."""
        return dict(zip(_STATUSES, self._counts, strict=True))

    @staticmethod
    def _column(column: bytearray) -> NDArray[np.uint8]:
        """A view; it must not outlive the call, since a bytearray cannot grow while viewed."""
        return np.ndarray(len(column), dtype=np.uint8, buffer=column)

    def _at(self, ordinals: NDArray[np.intp]) -> list[Job]:
        found = (self._jobs[ordinal] for ordinal in ordinals.tolist())
        return [job for job in found if job is not None]

    def _fit(
        self,
        *,
        starred: bool | None = None,
        kind: str | None = None,
        video: bool | None = None,
        held: bool | None = None,
        trashed: bool = False,
    ) -> Bools:
        """Which ordinals have these flags; None means either."""
        wanted = {
            _GONE: False,
            _TRASHED: trashed,
            _STARRED: starred,
            _VIDEO: video,
            _HELD: held,
            _ENHANCE: None if kind is None else kind == "enhance",
        }
        mask = reduce(or_, (flag for flag, wish in wanted.items() if wish is not None))
        value = reduce(or_, (flag for flag, wish in wanted.items() if wish), 0)
        fit: Bools = (self._column(self._flags) & mask) == value
        return fit

    def _has_status(self, statuses: Iterable[JobStatus]) -> Bools:
        """Which ordinals have one of these states."""
        table = np.zeros(len(_STATUSES), dtype=np.bool_)
        table[[_STATUS_CODE[status] for status in statuses]] = True
        fit: Bools = table[self._column(self._status)]
        return fit

    def _uses_words(self, wanted: list[str]) -> Bools:
        """Which ordinals use every word, the last one as a prefix. Without words: none."""
        fit = np.zeros(len(self._ids), dtype=np.bool_)
        if not wanted:
            return fit
        fit[self._ordinals_of(self._beginning_with(wanted[-1]))] = True
        for word in dict.fromkeys(wanted[:-1]):
            also = np.zeros_like(fit)
            also[self._ordinals_of([word])] = True
            fit &= also
        return fit

    def _beginning_with(self, prefix: str) -> list[str]:
        vocabulary = self._vocabulary or []
        start = bisect_left(vocabulary, prefix)
        return vocabulary[start : bisect_left(vocabulary, prefix + _AFTER_ALL, start)]

    def _ordinals_of(self, wanted: list[str]) -> NDArray[np.intc]:
        """Ordinals of the jobs that use any of these words; unordered, with duplicates."""
        uses = self._uses
        return np.frombuffer(b"".join([uses[word] for word in wanted if word in uses]), np.intc)
