"""Connections over real sockets: who says nothing is closed, who is being answered is not."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from mochi_app.files import PROJECT_DIR
from mochi_app.web import connections
from mochi_app.web.connections import Connection
from tests.conftest import DEADLINE, eventually

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"  # but for the last line
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


class Line:
    """A client's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def says(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hears(self, what: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE):
            return await self.reader.readuntil(what)

    async def ended(self) -> None:
        """Wait until the server has closed it."""
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(ConnectionResetError):
                while await self.reader.read(1 << 16):
                    pass

    @property
    def open(self) -> bool:
        return not self.reader.at_eof() and self.reader.exception() is None


class Small:
    """A server of one page, which says "begun", waits for `go_on`, and says "ended"."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.state = ServerState()

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"ended", "more_body": False})

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Callable[[], Awaitable[Line]]]:
        config = uvicorn.Config(self.page, interface="asgi3", log_config=None, ws="none")
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Connection(config, self.state, {}), "127.0.0.1", 0
        )
        lines: list[Line] = []

        async def opened() -> Line:
            lines.append(Line(*await asyncio.open_connection(*server.sockets[0].getsockname()[:2])))
            return lines[-1]

        yield opened
        self.go_on.set()
        for line in lines:
            line.writer.close()
        server.close()
        await server.wait_closed()
        await eventually(lambda: not self.state.tasks, "the end of all answers")


@pytest.fixture
async def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    return Small()


async def test_who_sends_no_whole_request_is_closed(small: Small) -> None:
    async with small.served() as opened:
        answered = await opened()
        await answered.says(GET + b"\r\n")
        await answered.hears(b"begun")
        silent, half, drip = [await opened() for _ in range(3)]
        await half.says(GET)
        await drip.says(GET)

        async def dripping() -> None:
            while drip.open:
                with contextlib.suppress(ConnectionError):
                    await drip.says(b"a: b\r\n")
                await asyncio.sleep(0.02)

        dripper = asyncio.create_task(dripping())
        for line in (silent, half, drip):
            await line.ended()
        await dripper
        assert answered.open, "an answer may take as long as it likes"
        small.go_on.set()
        await answered.hears(b"ended")


async def test_the_next_request_of_a_connection_is_waited_for_no_longer(small: Small) -> None:
    small.go_on.set()
    begun = (GET + b"\r\n", b"GET / HT"), (GET + b"\r\n", b"\r\n"), (POST, b"a byte of its body")
    async with small.served() as opened:
        lines = []
        for whole, rest in begun:
            line = await opened()
            await line.says(whole)
            await line.hears(b"ended\r\n0\r\n\r\n")
            await line.says(rest)
            lines.append(line)
        for line in lines:
            await line.ended()
        pieces = await opened()
        for piece in (GET[:9], GET[9:], b"\r\n", GET, b"\r\n"):
            await pieces.says(piece)
        for _ in range(2):
            await pieces.hears(b"ended\r\n0\r\n\r\n")


async def test_the_longest_silent_makes_room(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", DEADLINE * 2)
    monkeypatch.setattr(connections, "most_connections", lambda: 4)
    async with small.served() as opened:
        asked = [await opened() for _ in range(3)]
        for line in asked:
            await line.says(GET + b"\r\n")
            await line.hears(b"begun")
        silent = [await opened() for _ in range(4)]
        for line in silent[:3]:
            await line.ended()
        assert silent[3].open
        await silent[3].says(GET + b"\r\n")
        await silent[3].hears(b"begun")
        beyond = await opened()
        await beyond.says(GET + b"\r\n")
        await beyond.hears(b"begun")
        assert len(small.state.connections) == 5, "who is being answered is never sent away"
        small.go_on.set()
        for line in [*asked, silent[3], beyond]:
            await line.hears(b"ended")


@pytest.mark.parametrize("hard", [300, 200])
def test_as_many_files_as_the_system_grants(hard: int) -> None:
    soft = (
        "import resource; from mochi_app.web import connections;"
        "connections.MOST_FILES = 256; connections.allow_files();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))

    done = subprocess.run(
        [sys.executable, "-c", soft], cwd=PROJECT_DIR, preexec_fn=limited,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"({min(hard, 256)}, {hard})\n"
