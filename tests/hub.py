"""A stand-in for the Hub on 127.0.0.1: serves a folder as one repository, and misbehaves on order.

It answers what huggingface_hub 2.4 asks of the real one (point HF_ENDPOINT at `Hub.url`):

    GET  /api/models/{repo}[/revision/{rev}][?blobs=true]   commit and files, with sizes and digests
    GET  /api/models/{repo}/tree/{commit}                   the same as a tree listing
    HEAD, GET /{repo}/resolve/{rev}/{path}                  a file, or for an LFS file a redirect

Files that the real Hub keeps in Git LFS come from a second server, as from a CDN: another origin,
Range, and no token (a request that brings one is refused, as a signed address refuses it).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "genmo/mochi-1-preview"
LFS_SUFFIXES = (".safetensors", ".model", ".png", ".bin")
CHUNK = 1 << 16
ALWAYS = 1_000_000


@dataclass
class Fault:
    """What goes wrong with a file's body, the next `times` times that it is asked for.

    `cut`: the connection ends after so many bytes of the answer, `reset` with an RST. `truncate`:
    the file ends there, headers included. `corrupt`: the byte at that place is another.
    """

    times: int = ALWAYS
    cut: int | None = None
    reset: bool = False
    truncate: int | None = None
    corrupt: int | None = None


@cache
def sha256(content: bytes) -> str:
    """The digest, computed once for contents that many tests serve."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Item:
    """One file of the repository."""

    path: str
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        """Digest by which LFS names it."""
        return sha256(self.content)

    @property
    def blob_id(self) -> str:
        """Digest by which Git names it; of an LFS file, of its pointer."""
        content = f"oid sha256:{self.sha256}".encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """What the resolve address answers with."""
        return self.sha256 if self.lfs else self.blob_id


class Hub:
    """The server, running while it is entered. Change the public attributes at any time.

    `status`: every API and file request answers with it. `gated`: files are refused as those of a
    gated repository are. `token`: files and API want this one. `pace`: bytes a second of each body.
    `sent` counts body bytes by path, `starts` lists by path where each answered GET began, `asked`
    counts the Hub's requests by (method, path).
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.items = {
            path: Item(path, content, path.endswith(LFS_SUFFIXES))
            for path, content in files.items()
        }
        listing = "".join(f"{item.path} {item.etag}\n" for item in self.items.values())
        self.commit = hashlib.sha1(listing.encode()).hexdigest()
        self.status: int | None = None
        self.gated = False
        self.token: str | None = None
        self.pace: float | None = None
        self.faults: dict[str, Fault] = {}
        self.sent: Counter[str] = Counter()
        self.starts: dict[str, list[int]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()
        self._front = Server(partial(HubHandler, self))
        self._cdn = Server(partial(CdnHandler, self))

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return self._front.url

    @property
    def cdn(self) -> str:
        """Where LFS files come from."""
        return self._cdn.url

    def size(self, paths: Iterable[str]) -> int:
        """Bytes of these files."""
        return sum(len(self.items[path].content) for path in paths)

    def fault(self, path: str) -> Fault:
        """Take the file's fault for one request; one that does nothing if there is none."""
        with self.lock:
            fault = self.faults.get(path)
            if fault is None or fault.times <= 0:
                return Fault()
            fault.times -= 1
            return fault

    def __enter__(self) -> Hub:
        self._front.start()
        self._cdn.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """No more connections; those that are open end too."""
        self._front.stop()
        self._cdn.stop()


def folder_files(folder: Path) -> dict[str, bytes]:
    """A folder's files, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Server(ThreadingHTTPServer):
    """An HTTP server in a thread, on a free port of 127.0.0.1."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection and remember it."""
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def stop(self) -> None:
        """Stop listening and end every connection."""
        if self._thread.is_alive():
            self.shutdown()
            self.server_close()
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    """What both servers have in common."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: pytest's output is for tests."""

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.answer()

    def do_GET(self) -> None:
        """One request."""
        self.answer()

    def answer(self) -> None:
        """What the server does."""
        raise NotImplementedError

    def count(self, path: str) -> None:
        """Remember that somebody asked."""
        with self.hub.lock:
            self.hub.asked[self.command, path] += 1

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send an answer; a body given to HEAD only counts for its length."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "no") -> None:
        """Send an error as the Hub words it."""
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(status, headers, json.dumps({"error": message}).encode())

    def send_file(self, item: Item, headers: dict[str, str]) -> None:
        """Send a file or a range of it, with the fault that is due."""
        fault = self.hub.fault(item.path) if self.command == "GET" else Fault()
        content = item.content[: fault.truncate]
        if fault.corrupt is not None:
            other = bytes([content[fault.corrupt] ^ 0xFF])
            content = content[: fault.corrupt] + other + content[fault.corrupt + 1 :]
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start and start >= len(content):
            self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        if start:
            last = len(content) - 1
            headers = headers | {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        headers = headers | {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
        if self.command == "GET":
            with self.hub.lock:
                self.hub.starts.setdefault(item.path, []).append(start)
        self.reply(206 if start else 200, headers)
        if self.command == "GET":
            self.send_body(item.path, content[start:], fault)

    def send_body(self, path: str, body: bytes, fault: Fault) -> None:
        """Send the bytes at the hub's pace, up to where the connection is to be cut."""
        for at in range(0, len(body), CHUNK):
            chunk = body[at : at + CHUNK]
            if fault.cut is not None:
                chunk = chunk[: max(0, fault.cut - at)]
            self.wfile.write(chunk)
            with self.hub.lock:
                self.hub.sent[path] += len(chunk)
            if fault.cut is not None and at + CHUNK > fault.cut:
                self.hang_up(fault.reset)
                return
            if self.hub.pace:
                time.sleep(len(chunk) / self.hub.pace)

    def hang_up(self, reset: bool) -> None:
        """End the connection in the middle: in order (FIN), or with an RST."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class HubHandler(Handler):
    """The Hub itself."""

    def answer(self) -> None:
        """Find out what is asked for."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        resolve = f"/{REPO}/resolve/"
        self.count(path.partition(resolve)[2].partition("/")[2] or path)
        given = self.headers.get("Authorization")
        if self.hub.status is not None:
            self.refuse(self.hub.status)
        elif self.hub.token and given not in (None, f"Bearer {self.hub.token}"):
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self.resolve(revision, name)
        elif path.startswith(f"/api/models/{REPO}"):
            self.describe(path.removeprefix(f"/api/models/{REPO}"), parse_qs(address.query))
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def describe(self, rest: str, query: dict[str, list[str]]) -> None:
        """The API's listings."""
        entries = self.hub.items.values()
        if rest.startswith("/tree/"):
            listing = [
                {"type": "file", "path": item.path, "size": len(item.content), "oid": item.blob_id}
                | ({"lfs": lfs_info(item, "oid")} if item.lfs else {})
                for item in entries
            ]
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())
            return
        if rest not in ("", "/revision/main", f"/revision/{self.hub.commit}"):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings: list[dict[str, Any]] = [{"rfilename": item.path} for item in entries]
        if "blobs" in query:
            for sibling, item in zip(siblings, entries, strict=True):
                sibling |= {"size": len(item.content), "blobId": item.blob_id}
                sibling |= {"lfs": lfs_info(item, "sha256")} if item.lfs else {}
        info = {"id": REPO, "sha": self.hub.commit, "siblings": siblings}
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def resolve(self, revision: str, name: str) -> None:
        """A file, or where it is."""
        item = self.hub.items.get(name)
        headers = {"X-Repo-Commit": self.hub.commit}
        if revision not in ("main", self.hub.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif item is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif self.hub.gated:
            self.refuse(401, "GatedRepo", f"Access to model {REPO} is restricted")
        elif item.lfs:
            linked = {"X-Linked-Etag": f'"{item.etag}"', "X-Linked-Size": str(len(item.content))}
            where = {"Location": f"{self.hub.cdn}/{item.path}"}
            self.reply(302, headers | linked | where)
        else:
            self.send_file(item, headers | {"ETag": f'"{item.etag}"'})


class CdnHandler(Handler):
    """Where LFS files lie."""

    def answer(self) -> None:
        """Send the file."""
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        if "Authorization" in self.headers:
            self.refuse(400, message="Only one auth mechanism allowed")
        elif name in self.hub.items:
            self.send_file(self.hub.items[name], {"ETag": '"of-the-cdn"'})
        else:
            self.refuse(404)


def lfs_info(item: Item, digest: str) -> dict[str, Any]:
    """What the listings say of an LFS file; they name the digest differently."""
    return {digest: item.sha256, "size": len(item.content), "pointerSize": 134}
