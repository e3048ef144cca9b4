"""Every job ever requested: records on the disk, with an index in memory in front of them.

The disk is the source of truth and the index follows it: reads are answered from memory, changes go
through the one writer (`writer.py`). Not here: the videos (`media.py`), and what may happen to a
job when (`studio/`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobStatus
from mochi_app.parameters import REQUEST_FIELDS
from mochi_app.request import Conflict, safe_repr
from mochi_app.store.checks import META, RecordDisk, uptime_of
from mochi_app.store.database import RecordStore
from mochi_app.store.job_index import JobIndex, JobPage, JobQuery, Revisions
from mochi_app.store.lock import HistoryLocked
from mochi_app.store.writer import Draft, Writer

__all__ = ["History", "HistoryError", "HistoryLocked", "JobPage", "JobQuery", "RecordDisk"]

UPTIME_SECONDS = 600.0  # of uptime that a kill may lose
ANSWER_SECONDS = 20.0  # longer than a database that is held by another program takes
FIXED = ("id", "owner", "request_id", "parent_id", "prompt")  # set at submit, indexed once


class History:
    """The jobs of one data folder. Created by `open`; used on one event loop.

    Reads are synchronous and answered from memory. A write returns once it is on the disk. It is
    made even if its caller is cancelled meanwhile, and index and disk still agree.
    """

    def __init__(self, store: RecordStore, index: JobIndex, thread: ThreadPoolExecutor) -> None:
        self._store = store
        self._index = index
        self._thread = thread
        self._writer = Writer(store, index, thread)
        self._looking: asyncio.Future[None] | None = None
        self._closed = False

    @classmethod
    async def open(cls, data_dir: Path) -> History:
        """Open the history of `data_dir`, created if missing. 100k jobs take about 3 s.

        Raises:
            HistoryLocked: another process serves this folder.
            HistoryError: the store is damaged, lost, of a later version, or not writable.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="history")
        store = RecordStore(data_dir)
        try:
            index = await asyncio.get_running_loop().run_in_executor(thread, store.open)
        except BaseException:
            thread.submit(store.close)  # when cancelled, the opening goes on until then
            thread.shutdown(wait=False)
            raise
        return cls(store, index, thread)

    async def close(self) -> None:
        """Finish pending writes, close the store and release the lock."""
        if self._closed:
            return
        self._closed = True
        await self._writer.close()
        await self._writer.run(self._store.close, len(self._index))
        self._thread.shutdown(wait=False)

    def begin_end(self) -> None:
        """Record that the server was asked to stop: if it is killed before it has, no job is to
        blame. May be called from a signal handler."""
        self._store.begin_end()

    @property
    def problem(self) -> str | None:
        """Why the last write failed, until one succeeds."""
        return self._writer.problem

    @property
    def uptime(self) -> float:
        """Total seconds that servers have had this history open: a clock that nobody sets, for
        times that must survive restarts."""
        return self._store.uptime

    async def keep_uptime(self) -> None:
        """Record the uptime if the last record is old. Raises HistoryError."""
        if self.uptime - uptime_of(self._store.meta) >= UPTIME_SECONDS:
            await self._writer.write(self._writer.touch)

    @property
    def server_died(self) -> bool:
        """Whether the previous server was killed, or lost its power, without having been asked to
        stop. Never true right after a restore."""
        return self._store.died

    def __len__(self) -> int:
        return len(self._index)

    @property
    def last_id(self) -> str | None:
        """The greatest id ever used, even if its job was removed. For `JobIds`."""
        return self._index.last_id

    def get(self, job_id: str) -> Job | None:
        """The job, in the trash or not."""
        return self._index.get(job_id)

    def find_request(self, owner: str, request_id: str) -> Job | None:
        """The job that this owner's request made, in the trash or not."""
        job_id = self._index.find_request((owner, request_id))
        return None if job_id is None else self._index.get(job_id)

    def with_status(self, *statuses: JobStatus) -> list[Job]:
        """Jobs in one of these states and not in the trash, oldest first."""
        return self._index.with_status(*statuses)

    def trashed(self) -> list[Job]:
        """Jobs in the trash, oldest first."""
        return self._index.trashed()

    def evictable(self, limit: int | None = None) -> list[Job]:
        """Completed, unstarred jobs that have a video and are not in the trash, oldest first."""
        return self._index.evictable(limit)

    def children(self, job_id: str) -> list[Job]:
        """Jobs made from this one and not in the trash, oldest first."""
        return self._index.children(job_id)

    def count(self, status: JobStatus) -> int:
        """How many jobs are in this state and not in the trash."""
        return self.counts()[status]

    def held(self) -> int:
        """How many PENDING jobs are held and not in the trash. Safe from any thread."""
        return self._index.held

    def counts(self) -> dict[JobStatus, int]:
        """Jobs by status, without the trash."""
        return self._index.counts()

    @property
    def revisions(self) -> Revisions:
        """How often the listings changed."""
        return self._index.revisions

    def list(self, query: JobQuery) -> JobPage:
        """One page of the jobs that `query` describes, newest first."""
        return self._index.page(query)

    async def add(self, job: Job, *, drawn: frozenset[str] = frozenset()) -> Job:
        """Add a new job with its request_id.

        If the owner used that request_id before, the job it made is returned instead, provided
        that the request is the same. Fields in `drawn` were not given by the caller (such as a
        drawn seed) and are not compared.

        Raises:
            Conflict: the request_id was used for another request; the message names the fields. Or
                the job it made is in the trash, where other calls would not find it.
            HistoryError: nothing was written.
        """

        def plan(draft: Draft) -> Job:
            earlier = (
                draft.find_request((job.owner, job.request_id))
                if job.request_id is not None
                else None
            )
            if earlier is not None:
                return same_request(earlier, job, drawn)
            if draft.get(job.id) is not None:
                raise Conflict(f"job {job.id} exists already")
            return draft.put(job)

        return await self._write_job(plan)

    async def update(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Replace a job by `change(job)`, given its newest state. `change` must not block.

        Whatever `change` raises is raised here, and nothing is written.

        Raises:
            NotFound: there is no such job.
            Conflict: a job cannot move to that status.
            HistoryError: nothing was written.
        """

        def plan(draft: Draft) -> Job:
            job = draft.known(job_id)
            changed = change(job)
            if changed == job:
                return job
            touched = [name for name in FIXED if getattr(changed, name) != getattr(job, name)]
            if touched:
                raise ValueError(f"job {job_id}: {', '.join(touched)} cannot change after submit")
            if changed.status != job.status:
                job.moved(changed.status)
            return draft.put(changed)

        return await self._write_job(plan)

    async def remove(self, job_id: str) -> None:
        """Permanently remove the record and its request_id.

        Raises:
            NotFound: there is no such job.
            HistoryError: nothing was written.
        """

        def plan(draft: Draft) -> Job:
            job = draft.known(job_id)
            draft.remove(job)
            draft.rows[META] = self._store.meta | {"last_id": self.last_id}  # ids never go back
            return job

        await self._writer.write(plan)

    async def check(self) -> None:
        """Check that the store is where the next start would look for it, and responds.

        Raises:
            HistoryError: it is not, or does not; no file in the data folder may be touched.
        """
        if self._closed:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._writer.run(self._store.check))
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
        looking = self._looking  # another caller may start another check
        await asyncio.wait([looking], timeout=ANSWER_SECONDS)
        try:
            if not looking.done():
                raise HistoryError(
                    f"the disk of the history has not answered for {ANSWER_SECONDS:g} seconds:"
                    " check the disk and the mount"
                )
            looking.result()
        except HistoryError as error:
            self._writer.set_problem(str(error))
            raise HistoryError(*error.args) from error  # other callers may share the first one

    async def _write_job(self, plan: Callable[[Draft], Job]) -> Job:
        job = await self._writer.write(plan)
        assert job is not None
        return job


def same_request(earlier: Job, job: Job, drawn: frozenset[str]) -> Job:
    """`earlier` if it was requested with the same parameters as `job`, except those in `drawn`.

    Raises:
        Conflict: it was not; the message names the fields. Or it is in the trash.
    """
    compared = [name for name in REQUEST_FIELDS if name not in drawn]
    differing = [name for name in compared if getattr(earlier, name) != getattr(job, name)]
    if differing:
        raise Conflict(
            f"request_id: {safe_repr(job.request_id)} made job {earlier.id} with another "
            f"{', '.join(differing)}, expected the same parameters or a new request_id"
        )
    if earlier.deleted_at is not None:
        raise Conflict(
            f"request_id: {safe_repr(job.request_id)} made job {earlier.id}, which is in the trash:"
            " restore_job takes it out of it; or use a new request_id"
        )
    return earlier
