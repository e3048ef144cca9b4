"""The only writer of the history: plans in, batches out, then the index.

One thread does all disk work. Writes are made in batches, one transaction each; the index changes
on the event loop once the batch is on the disk, not before. What a plan does is defined by its
caller (`history.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import orjson

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job
from mochi_app.request import NotFound, safe_repr
from mochi_app.store.checks import JOB, META, Rows, request_row
from mochi_app.store.database import RecordStore
from mochi_app.store.job_index import JobIndex, RequestKey

log = logging.getLogger(__name__)

MAX_BATCH = 100  # writes in one transaction; bounds the time the event loop spends on them
HEAL_SECONDS = 1.0  # between attempts to write to a store that failed

T = TypeVar("T")


class Draft:
    """The changes of one batch of writes. Reads see the batch so far."""

    def __init__(self, index: JobIndex) -> None:
        self._index = index
        self._requests: dict[RequestKey, str | None] = {}
        self.jobs: dict[str, Job | None] = {}
        self.rows: Rows = {}

    def get(self, job_id: str) -> Job | None:
        return self.jobs[job_id] if job_id in self.jobs else self._index.get(job_id)

    def known(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job is None:
            raise NotFound(f"job {safe_repr(job_id)}: there is no such job")
        return job

    def find_request(self, key: RequestKey) -> Job | None:
        found = self._requests[key] if key in self._requests else self._index.find_request(key)
        return None if found is None else self.get(found)

    def put(self, job: Job) -> Job:
        """The job as the disk will give it back: a copy that shares nothing with the caller's."""
        record = orjson.loads(orjson.dumps(job.to_record()))
        kept = Job.from_record(record)
        self.jobs[job.id] = kept
        self.rows[JOB + job.id] = record
        self._name_request(job, job.id)
        return kept

    def remove(self, job: Job) -> None:
        self.jobs[job.id] = self.rows[JOB + job.id] = None
        self._name_request(job, None)

    def _name_request(self, job: Job, job_id: str | None) -> None:
        if job.request_id is not None:
            key = (job.owner, job.request_id)
            self._requests[key] = self.rows[request_row(key)] = job_id


Plan: TypeAlias = Callable[[Draft], Job | None]
Outcome: TypeAlias = Job | Exception | None
Outcomes: TypeAlias = list[Outcome]


@dataclass(frozen=True, slots=True)
class _Write:
    """A pending write. Its future holds what the caller is to return or raise."""

    plan: Plan
    outcome: asyncio.Future[Outcome]


class Writer:
    """The writes of one open history. Used on one event loop.

    `problem` is why the last write failed, until one succeeds.
    """

    def __init__(self, store: RecordStore, index: JobIndex, thread: ThreadPoolExecutor) -> None:
        self.problem: str | None = None
        self._store = store
        self._index = index
        self._thread = thread
        self._waiting: list[_Write] = []
        self._writing: asyncio.Task[None] | None = None
        self._unsure: set[str] = set()  # jobs of a failed write, until they are read again
        self._healer: asyncio.Task[None] | None = None
        self._closed = False

    async def close(self) -> None:
        """Accept no more writes, and finish those that are pending."""
        self._closed = True
        if self._healer is not None:
            self._healer.cancel()
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def write(self, plan: Plan) -> Job | None:
        """Add `plan` to the next batch, and wait for it.

        Raises:
            HistoryError: nothing was written. Otherwise, whatever `plan` raises.
        """
        if self._closed:
            raise HistoryError("the history is closed: the server is shutting down")
        loop = asyncio.get_running_loop()
        write = _Write(plan, loop.create_future())
        self._waiting.append(write)
        if self._writing is None or self._writing.done():
            self._writing = loop.create_task(self._write_waiting())
        outcome = await write.outcome
        if isinstance(outcome, HistoryError):
            raise HistoryError(*outcome.args) from outcome  # other callers may share the first one
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            outcomes = await self._write_batch([write.plan for write in batch])
            for write, outcome in zip(batch, outcomes, strict=True):
                if not write.outcome.done():  # done: its caller was cancelled
                    write.outcome.set_result(outcome)

    async def _write_batch(self, plans: Sequence[Plan]) -> Outcomes:
        """Write all plans in one transaction; returns what each caller is to get."""
        try:
            await self._settle()
            draft = Draft(self._index)
            outcomes = [planned(plan, draft) for plan in plans]
            if draft.rows:
                self._unsure.update(draft.jobs)
                await self.run(self._store.write, draft.rows)
                self._unsure.clear()
                self._follow(draft.jobs)
                self._healed()
        except Exception as error:  # noqa: BLE001 - whatever it was, every caller must get it
            with contextlib.suppress(Exception):  # callers must get the first error
                await self._settle()
            self.set_problem(str(error))
            return [error] * len(plans)
        return outcomes

    def set_problem(self, problem: str) -> None:
        """Record why nothing can be written, and retry until something can."""
        if problem != self.problem:
            log.error("history: %s", problem)
        self.problem = problem
        if self._healer is None or self._healer.done():
            self._healer = asyncio.get_running_loop().create_task(self._heal(), name="healer")

    def _healed(self) -> None:
        if self.problem is not None:
            log.info("history: it can be written to again")
        self.problem = None

    async def _heal(self) -> None:
        while self.problem is not None:
            await asyncio.sleep(HEAL_SECONDS)
            if not self._waiting:  # otherwise a pending write is attempt enough
                with contextlib.suppress(HistoryError):
                    await self.write(self.touch)

    def touch(self, draft: Draft) -> None:
        """A plan that changes nothing, to try a write."""
        draft.rows[META] = dict(self._store.meta)

    async def _settle(self) -> None:
        """After a failed write, update the index to what the disk holds for its jobs."""
        if self._unsure:
            self._follow(await self.run(self._store.read, sorted(self._unsure)))
            self._unsure.clear()

    def _follow(self, jobs: Mapping[str, Job | None]) -> None:
        """Update the index to what has been committed."""
        for job_id, job in jobs.items():
            if job is None:
                self._index.remove(job_id)
            else:
                self._index.put(job)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run this on the disk thread, after everything that was queued before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


def planned(plan: Plan, draft: Draft) -> Outcome:
    """Run one plan; an error goes to its own caller and affects no other write."""
    try:
        return plan(draft)
    except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
        return error
