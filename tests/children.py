"""A rank's process, as its parent sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mochi_app.messages import (
    Cancelled,
    Configure,
    Done,
    Failed,
    JobEvent,
    Message,
    Ready,
    Run,
    decode,
    encode,
)
from tests.places import ROOT, TINY

EPOCH = 7


class Child:
    """One rank process and the parent's end of its channel."""

    def __init__(self, program: list[str], folder: Path, model: str = str(TINY)) -> None:
        self.log = folder / f"stderr-{time.monotonic_ns()}"
        self.scratch = folder / "scratch"
        self.config = Configure(
            slot=0, rank=0, world_size=1, model=model, device="cpu", dtype="auto",
            scratch=str(self.scratch), threads=1,
        )  # fmt: skip
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        self.lines = self.socket.makefile("rb")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "--channel", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        theirs.close()

    def send(self, *messages: Message) -> None:
        """All of them in one write, as if they had waited in the pipe."""
        self.socket.sendall(b"".join(encode(replace(item, epoch=EPOCH)) for item in messages))

    def events(self) -> Iterator[Message]:
        for line in self.lines:
            message = decode(line)
            assert message.epoch == EPOCH
            yield message

    def until(self, found: Callable[[Message], bool]) -> list[Message]:
        """Events up to the first that is `found`."""
        seen: list[Message] = []
        for message in self.events():
            seen.append(message)
            if found(message):
                return seen
        raise AssertionError(f"channel closed after {seen[-5:]}: {self.stderr()[-2000:]}")

    def start(self) -> list[Message]:
        """Configure it; events up to Ready."""
        self.send(self.config)
        return self.until(lambda message: isinstance(message, Ready))

    def outcome(self, job: Run) -> list[JobEvent]:
        """The job's events up to its end."""
        ends = (Done, Failed, Cancelled)
        seen = self.until(lambda item: isinstance(item, ends) and item.job_id == job.job_id)
        return [item for item in seen if isinstance(item, JobEvent) and item.job_id == job.job_id]

    def do(self, job: Run) -> JobEvent:
        """Run the job; how it ended."""
        self.send(job)
        return self.outcome(job)[-1]

    def done(self, job: Run) -> Done:
        """Run the job, which must succeed."""
        result = self.do(job)
        assert isinstance(result, Done), result
        return result

    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait(10)
