"""Connections of clients: how many there may be, and how long one may say nothing.

Whoever can reach the server can open connections, before any door, and each takes one of the files
that a process may have open. uvicorn waits without end for the first request of a connection, and
for the rest of one that has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # from the connection, or the answer before, until a request's head is whole
MOST_FILES = 1 << 16  # asked for; some programs that we start might close all they could have open
OPEN_MAX = 10240  # the most that macOS grants, whatever its "unlimited" says
MOST_CONNECTIONS = 4096  # more than that are kept only while they are answered


def allow_files() -> None:
    """Let this process, and those it starts, have as many files open as the system grants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (MOST_FILES, OPEN_MAX):
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        with contextlib.suppress(OSError, ValueError):  # it goes with fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def most_connections() -> int:
    """Half of the files: videos, history and ranks need some, and so does a burst of clients."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(soft // 2, MOST_CONNECTIONS)


class Connection(H11Protocol):
    """A connection that is closed when no whole request comes in time, or earlier to make room for
    a new one if it has been silent the longest. Never while it is answered."""

    _silent_since = 0.0  # loop.time()

    @property
    def _answered(self) -> bool:
        """Whether an answer is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._expect_request()
        if len(self.connections) > most_connections():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take what came; what is no request yet gives no more time."""
        super().data_received(data)  # it stops the clock
        if not self._answered and not self.transport.is_closing():
            self._expect_request()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._silent_since = self.loop.time()
        super().on_response_complete()

    def _expect_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(
            self._silent_since + HEAD_SECONDS, self.timeout_keep_alive_handler
        )

    def _make_room(self) -> None:
        silent = (
            other
            for other in self.connections
            if isinstance(other, Connection) and other is not self and not other._answered
        )
        longest = min(silent, key=lambda other: other._silent_since, default=None)
        if longest is not None:
            self.connections.discard(longest)
            longest.transport.abort()
