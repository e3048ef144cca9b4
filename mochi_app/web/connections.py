"""Limits on client connections: how many there may be, and how long one may stay silent.

Anyone who can reach the server can open connections, before authentication, and each takes one of
the process's file descriptors. uvicorn waits forever for the first request of a connection, and for
the rest of one that has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # from connecting, or the last response, until a request's head is complete
MOST_FILES = 1 << 16  # requested; some child programs may close all descriptors they could have
OPEN_MAX = 10240  # the most that macOS grants, even if it reports "unlimited"
MOST_CONNECTIONS = 4096  # beyond this, connections are kept only while they are answered


def allow_files() -> None:
    """Raise the limit of open files, for this process and its children, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (MOST_FILES, OPEN_MAX):
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        with contextlib.suppress(OSError, ValueError):  # fewer will do
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def most_connections() -> int:
    """Half of the files: videos, history and ranks need some, and so does a burst of clients."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(soft // 2, MOST_CONNECTIONS)


class Connection(H11Protocol):
    """A connection that is closed if no complete request arrives in time, or earlier in favour of a
    new one if it has been silent the longest. Never while it is answered."""

    _silent_since = 0.0  # loop.time()

    @property
    def _answered(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._expect_request()
        if len(self.connections) > most_connections():
            self._drop_silent()

    def data_received(self, data: bytes) -> None:
        """Handle data; an incomplete request does not extend the time."""
        super().data_received(data)  # it stops the timer
        if not self._answered and not self.transport.is_closing():
            self._expect_request()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        self._silent_since = self.loop.time()
        super().on_response_complete()

    def _expect_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(
            self._silent_since + HEAD_SECONDS, self.timeout_keep_alive_handler
        )

    def _drop_silent(self) -> None:
        silent = (
            other
            for other in self.connections
            if isinstance(other, Connection) and other is not self and not other._answered
        )
        longest = min(silent, key=lambda other: other._silent_since, default=None)
        if longest is not None:
            self.connections.discard(longest)
            longest.transport.abort()
