"""Child processes: each in its own session, killed with all it started, ended with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mochi_app.cancels import unbroken
from mochi_app.files import PROJECT_DIR
from mochi_app.logs import level_of
from mochi_app.platforms import signal_name

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.2
EXIT_GRACE = 1.0  # seconds by which an exit status may lag behind the end of its channel
REAP_SECONDS = 3.0  # after that, a process stuck in a driver is left to the kernel
STDERR_TAIL = 20  # lines
CHUNK = 8192  # bytes read at a time, and kept of a line without an end

log = logging.getLogger(__name__)


# The child's own side


def die_with_parent() -> None:
    """Have this process killed when its parent dies; exit if it just did.

    On Linux the kernel does it. Elsewhere, or if it refuses, a thread watches the parent.
    """
    parent = os.getppid()
    if not ask_kernel():
        threading.Thread(target=watch, args=(parent,), name="parent watch", daemon=True).start()
    if os.getppid() != parent:
        leave(0)


def ask_kernel() -> bool:
    """Request SIGKILL at the parent's death; whether that succeeded."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (AttributeError, OSError):
        return False
    return bool(prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)


def watch(parent: int) -> None:
    """Thread: kill this process, and its process group if it leads one, when `parent` is no longer
    its parent."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    leave(0)


def leave(status: int) -> NoReturn:
    """Exit the process at once, from any thread."""
    sys.stderr.flush()
    os._exit(status)


# The parent's side


class ChildProcess:
    """A child in its own session, and the tail of what it wrote to stderr.

    `who` names it for people. Started once; whoever starts it must call `end`, whatever happens.
    """

    def __init__(self, who: str) -> None:
        self.tail: deque[str] = deque(maxlen=STDERR_TAIL)
        self._who = who
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.returncode if self._process else None

    @property
    def label(self) -> str:
        """Name and process id, for people."""
        return f"{self._who} (pid {self.pid})"

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What it prints; only for a child that was started with `speaks`."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    async def start(
        self, command: Sequence[str], name: str, *, speaks: bool = False, **options: Any
    ) -> None:
        """Start the process. A cancel meanwhile waits for the spawn, then kills and reaps it.

        Its stderr goes to the log with `name` before each line, and so does its stdout, unless it
        `speaks`: then read it from `stdout`. `options` as for `subprocess`. Must run on the loop's
        own thread: the death signal that a child asks for follows the thread that started it.

        Raises:
            OSError: it could not be started.
        """
        try:
            await unbroken(self._spawn(command, name, speaks, options))
        except asyncio.CancelledError:
            await self.end()
            raise

    async def _spawn(
        self, command: Sequence[str], name: str, speaks: bool, options: Mapping[str, Any]
    ) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if speaks else asyncio.subprocess.STDOUT,
            start_new_session=True,
            cwd=PROJECT_DIR,
            **options,
        )
        stream = self._process.stderr if speaks else self._process.stdout
        assert stream is not None
        self._listening = asyncio.create_task(self._keep_stderr(stream, name))

    async def _keep_stderr(self, stream: asyncio.StreamReader, name: str) -> None:
        partial = b""
        while chunk := await stream.read(CHUNK):  # a line may be longer than any limit
            *lines, partial = (partial + chunk).split(b"\n")
            for line in lines:
                self._keep_line(name, line)
            partial = partial[-CHUNK:]
        self._keep_line(name, partial)

    def _keep_line(self, name: str, line: bytes) -> None:
        if text := line.decode("utf-8", "backslashreplace").rstrip():
            level = level_of(text)
            if level > logging.DEBUG:
                self.tail.append(text)
            log.log(level, "%s: %s", name, text)

    def kill(self) -> None:
        """Send SIGKILL to the process and to all that it started in its process group."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self, timeout: float | None = None) -> int | None:
        """The exit status; None if the process does not end within `timeout` seconds."""
        if self._process is None:
            return None
        try:
            async with asyncio.timeout(timeout):
                return await self._process.wait()
        except TimeoutError:
            return None

    async def last_words(self) -> None:
        """Give a process that closed its channel a moment for its exit status and stderr."""
        await self.wait(EXIT_GRACE)
        if self._listening is not None:
            await asyncio.wait([self._listening], timeout=EXIT_GRACE)

    async def end(self) -> None:
        """Kill it if it is alive, reap it and close its pipes, even if cancelled meanwhile."""
        self.kill()
        await unbroken(self._reap())

    async def _reap(self) -> None:
        if self._process is None:
            return
        if await self.wait(REAP_SECONDS) is None:
            log.error("%s does not end, even by SIGKILL", self.label)
        if self._listening is not None:
            # A grandchild that holds the pipe must not block us.
            await asyncio.wait([self._listening], timeout=EXIT_GRACE)
            self._listening.cancel()
        # Otherwise it closes a few turns of the loop later, when the loop may have ended.
        self._process._transport.close()  # type: ignore[attr-defined]

    def ending(self, lacking: str = "") -> str:
        """How the process ended, for people: its signal, or its exit code and last line of stderr.

        `lacking` is what was missing at its end, such as " and no result".
        """
        code = self.returncode
        if code is None:
            return f"{self.label} closed its channel"
        if code < 0:
            return f"{self.label} was killed by {signal_name(-code)}"
        words = f": {self.tail[-1]}" if self.tail and (code or lacking) else ""
        return f"{self.label} exited with code {code}{lacking}{words}"
