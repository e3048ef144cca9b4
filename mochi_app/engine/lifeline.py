"""A child process ends when its parent does, however that ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

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
