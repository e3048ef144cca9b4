"""The rank's end of its channel: messages out, commands in."""

from __future__ import annotations

import socket
import threading
from collections import deque
from dataclasses import replace

from mochi_app.child_process import leave
from mochi_app.codec import ProtocolError
from mochi_app.messages import (
    MAX_LINE_BYTES,
    Cancel,
    Message,
    Run,
    Shutdown,
    decode,
    encode,
)


class Channel:
    """Both directions of the socket to the parent; `send` may be called from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._socket.setblocking(True)
        self._lines = self._socket.makefile("rb")
        self._lock = threading.Lock()
        self.epoch = 0

    def send(self, message: Message) -> None:
        """Send one message with this process's epoch; exit if the parent is gone."""
        line = encode(replace(message, epoch=self.epoch))
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError:
            leave(0)

    def receive(self) -> Message | None:
        """The next command; None when the parent has closed its end.

        Raises:
            ProtocolError: the line is not a message, or is longer than `MAX_LINE_BYTES`.
        """
        try:
            line = self._lines.readline(MAX_LINE_BYTES + 1)
        except OSError:
            return None
        if not line.endswith(b"\n"):
            if len(line) > MAX_LINE_BYTES:
                raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes")
            return None
        return decode(line)


class Inbox:
    """Passes commands from the reader to the main thread: jobs in order, and cancels."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Run | Shutdown] = deque()
        self._current: str | None = None
        self._cancelled: set[str] = set()

    def put(self, command: Message) -> None:
        """Queue one command from the parent.

        Raises:
            ProtocolError: the message is not a command for a rank.
        """
        with self._changed:
            if isinstance(command, Run | Shutdown):
                self._waiting.append(command)
                self._changed.notify()
            elif isinstance(command, Cancel):
                known = {item.job_id for item in self._waiting if isinstance(item, Run)}
                if command.job_id == self._current or command.job_id in known:
                    self._cancelled.add(command.job_id)
            else:
                raise ProtocolError(f"a rank takes no {type(command).__name__}")

    def take(self) -> Run | None:
        """Wait for the next job, which becomes the current one; None at a shutdown."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            command = self._waiting.popleft()
            if isinstance(command, Shutdown):
                return None
            self._current = command.job_id
            return command

    def cancelled(self) -> bool:
        """Whether the current job was cancelled."""
        return self._current in self._cancelled

    def finish(self) -> None:
        """End the current job; a cancel that arrives later is ignored."""
        with self._changed:
            if self._current is not None:
                self._cancelled.discard(self._current)
            self._current = None
