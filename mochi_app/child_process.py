"""Child processes: spawned in a session of their own, killed whole, gone with their parent."""

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
EXIT_GRACE = 1.0  # seconds an exit status may lag behind the end of its channel
REAP_SECONDS = 3.0  # a process stuck in a driver is left to the kernel after that
STDERR_TAIL = 20  # lines
CHUNK = 8192  # bytes read at a time, and kept of a line that does not end

log = logging.getLogger(__name__)


# The child's own side


def die_with_parent() -> None:
    """Have this process killed when its parent dies; leave if it just did.

    Linux's kernel does it. Elsewhere, or where the kernel refuses, a thread watches the parent.
    """
    parent = os.getppid()
    if not ask_kernel():
        threading.Thread(target=watch, args=(parent,), name="parent watch", daemon=True).start()
    if os.getppid() != parent:
        leave(0)


def ask_kernel() -> bool:
    """Ask for SIGKILL at the parent's death; whether it will come."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (AttributeError, OSError):
        return False
    return bool(prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)


def watch(parent: int) -> None:
    """Thread: end this process, and what it has started in a session of its own, when `parent` is
    its parent no more."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    leave(0)


def leave(status: int) -> NoReturn:
    """End the process at once, from any thread."""
    sys.stderr.flush()
    os._exit(status)


# The parent's side


class ChildProcess:
    """A child in a session of its own, and the tail of what it wrote to stderr.

    `who` it is for people. Started once; whoever starts it ends it, whatever happens meanwhile.
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
        """The exit status, negative for a signal; None until it is there."""
        return self._process.returncode if self._process else None

    @property
    def label(self) -> str:
        """Which one it is, for people."""
        return f"{self._who} (pid {self.pid})"

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What it prints. Of a child that was started with `speaks`."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    async def start(
        self, command: Sequence[str], name: str, *, speaks: bool = False, **options: Any
    ) -> None:
        """Start the process. A cancel meanwhile waits for it, and kills and reaps it.

        What it writes to stderr goes to the log with `name` before each line, and what it prints as
        well, unless it `speaks`: then that is read from `stdout`. `options` as for `subprocess`.
        Must run on the loop's own thread: the death signal that a child asks for follows the thread
        that started it.

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
        """SIGKILL to the process and all that it started in its session."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self, timeout: float | None = None) -> int | None:
        """The exit status; None when it is not there within `timeout` seconds."""
        if self._process is None:
            return None
        try:
            async with asyncio.timeout(timeout):
                return await self._process.wait()
        except TimeoutError:
            return None

    async def last_words(self) -> None:
        """Give a process that closed its channel a moment to leave its exit status and stderr."""
        await self.wait(EXIT_GRACE)
        if self._listening is not None:
            await asyncio.wait([self._listening], timeout=EXIT_GRACE)

    async def end(self) -> None:
        """Kill it if it lives, reap it and free its pipes. A cancel meanwhile waits for that."""
        self.kill()
        await unbroken(self._reap())

    async def _reap(self) -> None:
        if self._process is None:
            return
        if await self.wait(REAP_SECONDS) is None:
            log.error("%s does not end, even by SIGKILL", self.label)
        if self._listening is not None:
            # A grandchild that holds the pipe must not hold us.
            await asyncio.wait([self._listening], timeout=EXIT_GRACE)
            self._listening.cancel()
        # Else it closes itself a few turns of the loop later, which may have ended by then.
        self._process._transport.close()  # type: ignore[attr-defined]

    def ending(self, lacking: str = "") -> str:
        """How the process ended, for people: its signal, or its exit code and last words.

        `lacking` is what was missed at its end, such as " and no result".
        """
        code = self.returncode
        if code is None:
            return f"{self.label} closed its channel"
        if code < 0:
            return f"{self.label} was killed by {signal_name(-code)}"
        words = f": {self.tail[-1]}" if self.tail and (code or lacking) else ""
        return f"{self.label} exited with code {code}{lacking}{words}"
