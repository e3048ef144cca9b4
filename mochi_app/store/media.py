"""Videos and posters on disk: put in place, found, counted, removed, swept.

Owns the folders below the data folder that hold files of jobs, and the order of the steps that make
a finished video durable. It does not own records (`history.py`) or the encoding of videos
(`engine/encode.py`). Every function blocks: call it in a thread. A path is only ever built from a
valid job id, a slot's number, or a bare file name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mochi_app.errors import MediaError
from mochi_app.files import fsync
from mochi_app.jobs import JOB_ID, parse_job_id
from mochi_app.request import safe_repr
from mochi_app.store.metadata import read_metadata

VIDEO_SUFFIX = ".mp4"
POSTER_SUFFIX = ".webp"
CHECKPOINT = "latents.safetensors"
TEMPORARY_PREFIX = "tmp-"
FOLDERS = ("videos", "posters", "withheld", "checkpoints", "scratch", "backups")


class MediaGone(MediaError):
    """The name is valid, but there is no such file."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How many files a sweep removed (from scratch, temporary ones), and videos it filed."""

    scratch: int
    temporary: int
    filed: int = 0


class MediaStore:
    """The media folders of one data folder. Safe to use from several threads."""

    def __init__(self, data_dir: Path) -> None:
        """Create missing folders and count the videos.

        Raises:
            OSError: a folder cannot be created or read.
        """
        self.data_dir = data_dir.resolve()
        for name in FOLDERS:
            (self.data_dir / name).mkdir(parents=True, exist_ok=True)
        self.videos = self.data_dir / "videos"
        self.posters = self.data_dir / "posters"
        self.trash = self.data_dir / "withheld"
        self.checkpoints = self.data_dir / "checkpoints"
        self._lock = threading.Lock()
        self._sizes = video_sizes(self.videos)
        self._trash_sizes = video_sizes(self.trash)

    def scratch(self, slot: int) -> Path:
        """The scratch folder of `slot`, emptied."""
        folder = self._scratch(slot)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def finalise(
        self, job_id: str, slot: int, video_name: str, poster_name: str
    ) -> tuple[str, str]:
        """Move a slot's finished video and poster into place; both are durable on return.

        The poster goes first: a video in place is complete and has its poster, even if the power
        fails in between.

        Returns:
            File names inside `videos` and `posters`.

        Raises:
            RequestError: not a job id.
            MediaError: a name is not that of a regular file in the slot's scratch folder.
            OSError: the disk refuses; calling again continues where it stopped.
        """
        job_id = parse_job_id(job_id)
        video = inside(self._scratch(slot), video_name)
        poster: Path | None = None
        try:
            poster = inside(self._scratch(slot), poster_name)
        except MediaGone:
            if not self._poster(job_id).is_file():  # otherwise an earlier call has moved it
                raise
        for source in filter(None, (poster, video)):
            fsync(source)
        size = video.stat().st_size
        for place, target in ((poster, self._poster(job_id)), (video, self._video(job_id))):
            if place is not None:
                move(place, target)
            fsync(target.parent)
        with self._lock:
            self._sizes[job_id] = size
        return self._video(job_id).name, self._poster(job_id).name

    def scratch_size(self, slot: int, name: str) -> int:
        """Bytes of a file in the slot's scratch folder. Raises as `finalise`."""
        return inside(self._scratch(slot), name).stat().st_size

    def tidy(self, slot: int, job_id: str) -> None:
        """Remove what an ended run of the job left in the slot's scratch folder, complete or not.

        What the disk refuses to remove is left to the next start.
        """
        with contextlib.suppress(OSError):
            for path in self._scratch(slot).glob(f"*{parse_job_id(job_id)}*"):
                path.unlink(missing_ok=True)

    def has_video(self, job_id: str) -> bool:
        """Whether the job's video was in place at the last check; does not access the disk."""
        return job_id in self._sizes

    def video_path(self, job_id: str) -> Path | None:
        """The job's video, or None if there is none; notices changes made by others.

        Raises:
            RequestError: not a job id.
            OSError: the disk cannot be read.
        """
        path = self._video(parse_job_id(job_id))
        with self._lock:
            try:
                self._sizes[job_id] = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                self._sizes.pop(job_id, None)
                return None
        return path

    def poster_path(self, job_id: str) -> Path | None:
        """The job's poster, or None if there is none.

        Raises:
            RequestError: not a job id.
        """
        path = self._poster(parse_job_id(job_id))
        return path if path.is_file() else None

    def move_to_trash(self, job_id: str) -> None:
        """Move the job's video, if there is one, out of the folder that is served.

        Raises:
            RequestError: not a job id.
            OSError: the disk refuses.
        """
        self._move(parse_job_id(job_id), self.videos, self.trash)

    def take_from_trash(self, job_id: str) -> None:
        """Undo `move_to_trash`. Raises as it does."""
        self._move(parse_job_id(job_id), self.trash, self.videos)

    def _move(self, job_id: str, source: Path, target: Path) -> None:
        name = job_id + VIDEO_SUFFIX
        if not (source / name).is_file():
            return
        size = (source / name).stat().st_size
        move(source / name, target / name)
        with self._lock:
            sizes = {self.videos: self._sizes, self.trash: self._trash_sizes}
            sizes[source].pop(job_id, None)
            sizes[target][job_id] = size
        for folder in (target, source):
            fsync(folder)

    def remove_video(self, job_id: str) -> None:
        """Remove the job's video and keep its poster. Raises as `remove`."""
        job_id = parse_job_id(job_id)
        self._video(job_id).unlink(missing_ok=True)
        fsync(self.videos)
        with self._lock:
            self._sizes.pop(job_id, None)

    def remove(self, job_id: str) -> None:
        """Permanently remove the job's video and poster, as far as they exist.

        Raises:
            RequestError: not a job id.
            OSError: the disk refuses; calling again continues where it stopped.
        """
        job_id = parse_job_id(job_id)
        trashed = self.trash / (job_id + VIDEO_SUFFIX)
        for path in (self._video(job_id), trashed, self._poster(job_id)):
            path.unlink(missing_ok=True)
        for folder in (self.videos, self.trash, self.posters):
            fsync(folder)
        with self._lock:
            self._sizes.pop(job_id, None)
            self._trash_sizes.pop(job_id, None)

    def checkpoint(self, job_id: str) -> Path:
        """The path of the job's checkpoint; the engine creates the file and its folder.

        Raises:
            RequestError: not a job id.
        """
        return self.checkpoints / parse_job_id(job_id) / CHECKPOINT

    def checkpoint_time(self, job_id: str) -> float:
        """When the job's checkpoint was written, in Unix seconds; 0 if there is none.

        Raises:
            RequestError: not a job id.
        """
        path = self.checkpoint(job_id)
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    def remove_checkpoint(self, job_id: str) -> None:
        """Remove the job's checkpoint, if any; what cannot be removed is swept later.

        Raises:
            RequestError: not a job id.
        """
        shutil.rmtree(self.checkpoint(job_id).parent, ignore_errors=True)

    def sweep_checkpoints(self, going_on: Collection[str]) -> int:
        """Remove checkpoints of jobs that are not in `going_on`, as far as possible; returns how
        many. Only at start."""
        gone = [path for path in self.checkpoints.iterdir() if path.name not in going_on]
        for path in gone:
            with contextlib.suppress(OSError):
                remove_path(path)
        return len(gone)

    def job_ids(self) -> list[str]:
        """Ids of the jobs whose video is in place, oldest first."""
        with self._lock:
            return sorted(self._sizes)

    def poster_ids(self) -> list[str]:
        """Ids of the jobs that have a poster."""
        return sorted(
            name.removesuffix(POSTER_SUFFIX)
            for name in os.listdir(self.posters)
            if is_job_file(name, POSTER_SUFFIX)
        )

    def orphans(self) -> list[str]:
        """Names in the folder of videos that are not job videos."""
        names = sorted(os.listdir(self.videos))
        return [name for name in names if not is_job_file(name, VIDEO_SUFFIX)]

    def trashed_ids(self) -> list[str]:
        """Ids of the jobs whose video is in the trash, oldest first."""
        with self._lock:
            return sorted(self._trash_sizes)

    def size(self, job_id: str) -> int:
        """Bytes of the job's video, in the trash or not; 0 if there is none."""
        with self._lock:
            return self._sizes.get(job_id, 0) + self._trash_sizes.get(job_id, 0)

    def total_bytes(self) -> int:
        """Bytes of all videos, including the trash; posters are not counted."""
        with self._lock:
            return sum(self._sizes.values()) + sum(self._trash_sizes.values())

    def free_bytes(self) -> int:
        """Free bytes on the data folder's filesystem."""
        return shutil.disk_usage(self.data_dir).free

    def sweep(self, unfiled: Collection[str] = ()) -> Swept:
        """Put into place the videos that an earlier server finished for the jobs `unfiled`, and
        remove leftovers. Only at start: nothing else may run meanwhile.

        What the disk refuses to remove is left to the next start.
        """
        scratch = filed = 0
        for folder in (self.data_dir / "scratch").iterdir():
            if folder.is_dir() and not folder.is_symlink():
                filed += self._file_finished(folder, unfiled)
                scratch += sum(1 for path in folder.rglob("*") if not path.is_dir())
            else:
                scratch += 1
            with contextlib.suppress(OSError):
                remove_path(folder)
        temporary = [
            path
            for folder in (self.videos, self.posters, self.trash)
            for path in folder.glob(f"{TEMPORARY_PREFIX}*")
        ]
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink()
        return Swept(scratch=scratch, temporary=len(temporary), filed=filed)

    def _file_finished(self, folder: Path, unfiled: Collection[str]) -> int:
        """Put the complete videos of these jobs in a slot's scratch folder into place; how many."""
        filed = 0
        for path in sorted(folder.glob(f"*{VIDEO_SUFFIX}")):
            job_id = path.name.removesuffix(VIDEO_SUFFIX)
            if job_id in unfiled and folder.name.isdecimal():
                with contextlib.suppress(MediaError, OSError):  # then the job runs again
                    if read_metadata(path).get("job_id") == job_id:
                        self.finalise(job_id, int(folder.name), path.name, job_id + POSTER_SUFFIX)
                        filed += 1
        return filed

    def recount(self) -> None:
        """Count the videos again: their folders were missing or replaced.

        Raises:
            OSError: a folder cannot be read.
        """
        with self._lock:
            self._sizes = video_sizes(self.videos)
            self._trash_sizes = video_sizes(self.trash)

    def _scratch(self, slot: int) -> Path:
        return self.data_dir / "scratch" / str(int(slot))

    def _video(self, job_id: str) -> Path:
        return self.videos / (job_id + VIDEO_SUFFIX)

    def _poster(self, job_id: str) -> Path:
        return self.posters / (job_id + POSTER_SUFFIX)


def move(source: Path, target: Path) -> None:
    """Move a file, even to another disk; `target` is never incomplete.

    Raises:
        OSError: the disk refuses; the file is where it was.
    """
    try:
        os.replace(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        shutil.copyfile(source, temporary)
        fsync(temporary)
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # it is swept later
        source.unlink()


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with its content. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def video_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each job's video in a folder, by job id."""
    return {
        entry.name.removesuffix(VIDEO_SUFFIX): entry.stat(follow_symlinks=False).st_size
        for entry in os.scandir(folder)
        if is_job_file(entry.name, VIDEO_SUFFIX) and entry.is_file(follow_symlinks=False)
    }


def is_job_file(name: str, suffix: str) -> bool:
    """Whether `name` is a job id followed by `suffix`."""
    return name.endswith(suffix) and JOB_ID.fullmatch(name.removesuffix(suffix)) is not None


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` directly inside `folder`.

    Raises:
        MediaError: `name` is more than a bare name, or there is no such file.
    """
    path = folder / name
    if not name or name in (".", "..") or "\0" in name or path.parent != folder:
        raise MediaError(f"file name {safe_repr(name)}: expected a bare name without folders")
    if path.is_symlink() or not path.is_file():
        raise MediaGone(f"{safe_repr(name)}: no such file in {folder.name}")
    return path
