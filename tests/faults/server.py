"""The real app over ranks with a faked model: `python -m tests.faults.server BEHAVIOUR`.

FAULTS_QUEUE names a file that harms Gradio's queue while it is there. It says how: "raise" ends
the queue's loop whenever it takes an event, "drop" loses one ticket, and the file is removed.
FAULTS_VIDEO names a file that, while it is there, ends the server (SIGKILL) when a video is in
place and its record does not say so yet.
FAULTS_CLOCK names a file with the seconds by which the server's clock is wrong, if it is there.
FAULTS_FILING names a file that, while it is there, says with which error (EROFS) no finished video
is taken.
FAULTS_FILES is how many files the server may have open, a quarter of it at first, and
FAULTS_PATIENCE how many seconds it waits for a request.
"""

import errno
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gradio.queueing import Queue

from mochi_app import app
from mochi_app.store.media import MediaStore
from mochi_app.web import connections
from tests.conftest import fake_engine


def harm_queue(flag: Path) -> None:
    """Let the queue's own loop do what `flag` says."""
    get_events = Queue.get_events

    def harmed(self: Queue) -> Any:
        taken = get_events(self)
        harm = flag.read_text() if taken and flag.exists() else ""
        if harm == "raise":
            raise KeyError("a session that was dropped")
        if taken and harm == "drop" and taken[0][0].fn.api_name == "engine_turn":
            flag.unlink()
            return None
        return taken

    Queue.get_events = harmed  # type: ignore[method-assign]


def harm_videos(flag: Path) -> None:
    """Die between a video and its record."""
    finalise = MediaStore.finalise

    def harmed(
        self: MediaStore, job_id: str, slot: int, video_name: str, poster_name: str
    ) -> tuple[str, str]:
        names = finalise(self, job_id, slot, video_name, poster_name)
        if flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return names

    MediaStore.finalise = harmed  # type: ignore[method-assign]


def harm_clock(step: Path) -> None:
    """Set the wall clock, as whoever asks for `time.time()` sees it, off by what `step` says."""
    right = time.time

    def harmed() -> float:
        return right() + (float(step.read_text()) if step.exists() else 0.0)

    time.time = harmed


def harm_filing(flag: Path) -> None:
    """Refuse every finished video with the error that `flag` names."""
    finalise = MediaStore.finalise

    def harmed(
        self: MediaStore, job_id: str, slot: int, video_name: str, poster_name: str
    ) -> tuple[str, str]:
        if flag.exists():
            number = getattr(errno, flag.read_text())
            raise OSError(number, os.strerror(number))
        return finalise(self, job_id, slot, video_name, poster_name)

    MediaStore.finalise = harmed  # type: ignore[method-assign]


if __name__ == "__main__":
    if path := os.environ.get("FAULTS_CLOCK"):
        harm_clock(Path(path))
    if path := os.environ.get("FAULTS_FILING"):
        harm_filing(Path(path))
    if path := os.environ.get("FAULTS_VIDEO"):
        harm_videos(Path(path))
    if path := os.environ.get("FAULTS_QUEUE"):
        harm_queue(Path(path))
    if files := int(os.environ.get("FAULTS_FILES", 0)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files // 4, files))
    if seconds := float(os.environ.get("FAULTS_PATIENCE", 0)):
        connections.HEAD_SECONDS = seconds
    sys.exit(app.main(fake_engine(sys.argv[1])))
