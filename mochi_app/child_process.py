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
from collections.abc import Sequence
from typing import Any, NoReturn

from mochi_app.files import PROJECT_DIR
from mochi_app.logs import level_of
from mochi_app.platforms import signal_name

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.2


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


EXIT_GRACE = 1.0  # seconds an exit status may lag behind the end of its channel
REAP_SECONDS = 3.0  # a process stuck in a driver is left to the kernel after that
STDERR_TAIL = 20  # lines


log = logging.getLogger(__name__)


async def _spawn(*command: str) -> asyncio.subprocess.Process:
    """Start the child; a cancel meanwhile waits for it and kills it."""
    start = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            cwd=PROJECT_DIR,
        )
    )
    try:
        return await asyncio.shield(start)
    except asyncio.CancelledError:
        await asyncio.wait([start])
        if not start.cancelled() and start.exception() is None:
            await _end(start.result())
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the child if it lives, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    transport: Any = process._transport  # type: ignore[attr-defined]
    transport.close()  # else it closes itself later, when the loop may have ended


async def _keep_stderr(stream: asyncio.StreamReader, tail: deque[str]) -> None:
    """Log the child's stderr and keep its last line."""
    while chunk := await stream.read(8192):  # a line may be longer than any limit
        for line in chunk.decode("utf-8", "backslashreplace").splitlines():
            if text := line.strip():
                tail.append(text)
                log.log(level_of(text), "weights: %s", text)


def _ending(process: asyncio.subprocess.Process, tail: Sequence[str]) -> str:
    """How a child ended that did not say so itself."""
    who, code = f"the download process (pid {process.pid})", process.returncode or 0
    if code < 0:
        return f"{who} was killed by {signal_name(-code)}: it goes on at the next start"
    words = f": {tail[-1]}" if tail else ""
    return f"{who} ended with code {code} and no result{words}"
