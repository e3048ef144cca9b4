"""One rank as its slot sees it: the process, its channel, the tail of its stderr.

Started, spoken to, killed and reaped here; what its messages mean and when it must end is the
slot's (`slot.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence

from mochi_app import messages
from mochi_app.child_process import EXIT_GRACE, REAP_SECONDS, STDERR_TAIL
from mochi_app.files import PROJECT_DIR
from mochi_app.logs import level_of
from mochi_app.messages import Message
from mochi_app.platforms import signal_name

log = logging.getLogger(__name__)


class RankProcess:
    """One rank: its process, its channel and the tail of its stderr."""

    def __init__(self, rank: int, device: str) -> None:
        self.rank = rank
        self.device = device
        self.ready = False
        self.heard_at = time.monotonic()
        self.gpu_bytes: int | None = None
        self.tail: deque[str] = deque(maxlen=STDERR_TAIL)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._stderr_task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None before the spawn."""
        return self._process.pid if self._process else None

    @property
    def label(self) -> str:
        """Which one it is, for people."""
        return f"rank {self.rank} (pid {self.pid})"

    async def spawn(self, command: Sequence[str], name: str) -> None:
        """Start the process in a session of its own, with one end of a socketpair.

        Must run on the loop's own thread: the death signal that the rank asks for follows the
        thread that spawned it.
        """
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                "--channel",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd=PROJECT_DIR,
                env=self._environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=ours, limit=messages.MAX_LINE_BYTES
        )
        self._stderr_task = asyncio.create_task(self._keep_stderr(name))

    def _environment(self) -> dict[str, str]:
        visible = "" if self.device == "cpu" else self.device
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": visible,
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    async def _keep_stderr(self, name: str) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        partial = ""
        while chunk := await self._process.stdout.read(8192):
            *lines, partial = (partial + chunk.decode("utf-8", "backslashreplace")).split("\n")
            for line in lines:
                self._keep_line(name, line)
            partial = partial[-8192:]
        self._keep_line(name, partial)

    def _keep_line(self, name: str, line: str) -> None:
        if line.strip():
            level = level_of(line)
            if level > logging.DEBUG:
                self.tail.append(line.rstrip())
            log.log(level, "%s: %s", name, line.rstrip())

    async def receive(self) -> Message | None:
        """The next message, None at the end of the channel.

        Raises:
            messages.ProtocolError: something else came.
        """
        assert self._reader is not None
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        except ValueError as error:  # longer than the limit
            raise messages.ProtocolError(str(error)) from error
        if not line:
            return None
        if not line.endswith(b"\n"):
            raise messages.ProtocolError(f"half a message: {line[:80]!r}")
        return messages.decode(line)

    def send(self, message: Message) -> None:
        """Write a command. A dead process is noticed by its exit, not here."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(messages.encode(message))

    def kill(self) -> None:
        """SIGKILL to the rank and all that it started."""
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
        if self._stderr_task is not None:
            await asyncio.wait([self._stderr_task], timeout=EXIT_GRACE)

    async def close(self) -> None:
        """Reap the process and free the channel."""
        if await self.wait(REAP_SECONDS) is None and self._process is not None:
            log.error("rank %d (pid %s) does not end, even by SIGKILL", self.rank, self.pid)
        if self._writer is not None:
            self._writer.close()
        if self._stderr_task is not None:
            # A grandchild that holds the pipe must not hold us.
            await asyncio.wait([self._stderr_task], timeout=EXIT_GRACE)
            self._stderr_task.cancel()
        if self._process is not None:
            # Else it closes itself a few turns of the loop later, which may have ended by then.
            self._process._transport.close()  # type: ignore[attr-defined]

    def ending(self) -> str:
        """How the process ended, for people: signal or exit code, and its last words."""
        code = self._process.returncode if self._process else None
        who = self.label
        if code is None:
            return f"{who} closed its channel"
        if code < 0:
            return f"{who} was killed by {signal_name(-code)}"
        words = f": {self.tail[-1]}" if self.tail and code else ""
        return f"{who} exited with code {code}{words}"
