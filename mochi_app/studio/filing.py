"""Finished videos wait for their folder: no result is lost because the disk refuses it.

Not here: the steps that put a video into place, and the check that the folders are usable again
(`media.py` and `outputs.py` of the store).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from mochi_app.disk_errors import reason_of, unusable
from mochi_app.errors import without_folders
from mochi_app.messages import Done
from mochi_app.slots.job_run import JobCancelled
from mochi_app.store.history import History
from mochi_app.store.media import MediaGone, MediaStore
from mochi_app.store.outputs import Outputs
from mochi_app.studio.live import Live

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# How long usable folders may refuse one file until the problem counts as the file's own
FILING_SECONDS = 300.0


class Unfiled(Exception):
    """The server is stopping and a finished video stays in scratch: the next start files it."""


class Filing:
    """Puts finished videos into place, after `free_space` was called with their size in bytes."""

    def __init__(
        self,
        history: History,
        media: MediaStore,
        outputs: Outputs,
        *,
        free_space: Callable[[int], Awaitable[None]],
        stopping: Callable[[], bool],
    ) -> None:
        self._history = history
        self._media = media
        self._outputs = outputs
        self._free_space = free_space
        self._stopping = stopping

    async def file(self, job_id: str, slot: int, done: Done, live: Live) -> tuple[str, str]:
        """Put the video that `slot` has finished into place, as soon as the folders can be used;
        returns the names of video and poster.

        Raises:
            JobCancelled: the job was cancelled while it waited.
            Unfiled: the server is stopping.
            MediaError, OSError: it cannot be saved, and the folders are not to blame.
        """
        refused_since: float | None = None
        try:
            while True:
                if await self._outputs.check():
                    try:
                        return await self._file(job_id, slot, done)
                    except (MediaGone, OSError) as error:
                        refused_since = refused_since or time.monotonic()
                        late = time.monotonic() - refused_since > FILING_SECONDS
                        if late or not await self._is_to_wait(error):
                            raise
                        reason = str(error) if isinstance(error, MediaGone) else reason_of(error)
                else:
                    refused_since = None
                    reason = self._history.problem or self._outputs.problem_of_folders or ""
                if self._stopping():
                    raise Unfiled(reason)
                if live.cancel_requested:
                    raise JobCancelled
                self._wait(job_id, live, without_folders(reason))
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            live.waits_for = None
            self._outputs.filed(job_id)

    async def _is_to_wait(self, error: Exception) -> bool:
        """Whether the folders are to blame that a video could not be put into place."""
        if isinstance(error, MediaGone):  # it is lost if its folder is the right one
            return not await self._outputs.check()
        return unusable(error)

    async def _file(self, job_id: str, slot: int, done: Done) -> tuple[str, str]:
        size = await asyncio.to_thread(self._media.scratch_size, slot, done.video)
        await self._free_space(size)
        return await asyncio.to_thread(self._media.finalise, job_id, slot, done.video, done.poster)

    def _wait(self, job_id: str, live: Live, reason: str) -> None:
        if live.waits_for is None:
            log.error("job %s: its finished video waits: %s", job_id, reason)
        live.waits_for = reason
        self._outputs.wait(job_id, reason)
