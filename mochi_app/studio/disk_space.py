"""Free space on the disk: enough for all accepted jobs, or the reason why a job must wait.

Checked twice: a job is accepted only if the disk has space for its video alongside those of all
jobs accepted before it, and it is started only if the disk still does. Figures are bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mochi_app.jobs import Job
from mochi_app.store.media import MediaStore
from mochi_app.studio import scheduling

MARGIN = 256 << 20  # for the history, posters, and whatever else is on that disk
BYTES_PER_PIXEL_FRAME = 0.25  # more than any video at our quality has needed


def video_bytes(job: Job) -> int:
    """Space to reserve for the job's video."""
    return volume_bytes(scheduling.volume(job))


def volume_bytes(volume: int) -> int:
    """Space to reserve for a video of `volume` pixels × frames."""
    return int(volume * BYTES_PER_PIXEL_FRAME)


class DiskSpace:
    """The free space on the data folder's disk at the last measurement."""

    def __init__(self, media: MediaStore) -> None:
        self._media = media
        self.free: int | None = None

    async def measure(self) -> None:
        """Measure the free space.

        Raises:
            OSError: the disk does not respond.
        """
        self.free = await asyncio.to_thread(self._media.free_bytes)

    def lack(self, job: Job, others: Iterable[Job] = ()) -> str | None:
        """Why there is no space for the job alongside what `others` will still write; None if
        there is, or nothing has been measured yet."""
        promised = sum(video_bytes(other) for other in others)
        return self.lack_for(scheduling.volume(job), promised)

    def lack_for(self, volume: int, promised: int = 0) -> str | None:
        """Like `lack`, for a video of `volume` pixels × frames alongside `promised` bytes."""
        if self.free is None:
            return None
        needed = MARGIN + volume_bytes(volume)
        if self.free >= needed + promised:
            return None
        beside = f" beside {size(promised)} for the jobs before it" if promised else ""
        return f"the disk has {size(self.free)} free, this video needs {size(needed)}{beside}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
