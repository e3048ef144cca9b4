"""One rank as its slot sees it: a child process with a channel.

Starts the process, sends and receives messages, and ends it; what messages mean and when it must
end is decided by the slot (`slot.py`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence

from mochi_app import messages
from mochi_app.child_process import ChildProcess
from mochi_app.codec import ProtocolError
from mochi_app.messages import Message


class RankProcess(ChildProcess):
    """One rank: its process and its channel."""

    def __init__(self, rank: int, device: str) -> None:
        super().__init__(f"rank {rank}")
        self.rank = rank
        self.device = device
        self.ready = False
        self.heard_at = time.monotonic()
        self.gpu_bytes: int | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def spawn(self, command: Sequence[str], name: str) -> None:
        """Start the process with one end of a socketpair; otherwise like `start`."""
        ours, theirs = socket.socketpair()
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(
                sock=ours, limit=messages.MAX_LINE_BYTES
            )
            await self.start(
                [*command, "--channel", str(theirs.fileno())],
                name,
                pass_fds=(theirs.fileno(),),
                env=self._environment(),
            )
        except BaseException:
            (self._writer or ours).close()
            raise
        finally:
            theirs.close()

    def _environment(self) -> dict[str, str]:
        visible = "" if self.device == "cpu" else self.device
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": visible,
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    async def receive(self) -> Message | None:
        """The next message, None at the end of the channel.

        Raises:
            ProtocolError: what arrived is not a message.
        """
        assert self._reader is not None
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        except ValueError as error:  # longer than the limit
            raise ProtocolError(str(error)) from error
        if not line:
            return None
        if not line.endswith(b"\n"):
            raise ProtocolError(f"half a message: {line[:80]!r}")
        return messages.decode(line)

    def send(self, message: Message) -> None:
        """Write a command. A dead process is noticed by its exit, not here."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(messages.encode(message))

    async def end(self) -> None:
        """Kill it if it is alive, reap it, and close its pipes and its channel."""
        try:
            await super().end()
        finally:
            if self._writer is not None:
                self._writer.close()
