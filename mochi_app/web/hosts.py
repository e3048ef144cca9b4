"""The host names and the path prefix under which this server answers.

Once open, a page of any site can point its own name to this machine's address (DNS rebinding), and
is then same-origin with the server. Only the `Host` header shows it, so a server without a login
answers only under names that nobody else can own, and those in its settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mochi_app.setting_types import HOST_NAME
from mochi_app.settings import SettingsError
from mochi_app.web.middleware import explained_refusal

PROBES = frozenset({"/livez", "/healthz"})  # monitors may use any name
UNSERVED = "mochi.unserved"  # in the scope of a probe under a host that is not served
LOCAL_SUFFIXES = (".local", ".lan", ".internal")  # not sold by any registry
HOST_HEADER = re.compile(
    rf"(?:(?P<name>{HOST_NAME})\.?|\[(?P<ipv6>[0-9a-f:.]+)\])(?::[0-9]{{0,5}})?"
)
PATH = re.compile(r"(/[A-Za-z0-9_.~%-]+)*")
MOST_CHARACTERS = 261  # of a Host header: a name's 253, a dot, brackets or a port


def host_name(header: str) -> str | None:
    """The host in a `Host` header: lower case, without port, brackets and final dot. None if the
    header is not valid."""
    found = HOST_HEADER.fullmatch(header.lower()) if len(header) <= MOST_CHARACTERS else None
    if found is None:
        return None
    if found["ipv6"] is not None and not is_address(found["ipv6"]):
        return None
    if found["ipv6"] is not None and ":" not in found["ipv6"]:
        return None
    return found["name"] or found["ipv6"]


def is_address(name: str) -> bool:
    """Whether it is an IP address."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


class ServedHosts:
    """The hosts under which a server without a login answers.

    These are localhost, IP addresses, names without a dot, names ending in `LOCAL_SUFFIXES`, the
    machine's own names, those of a Space and of the public address, and the `allowed` ones: names,
    `*.name` for all below a name, `*` for all.
    """

    def __init__(
        self, allowed: Iterable[str] = (), public_host: str | None = None, space_host: str = ""
    ) -> None:
        """`space_host` is the variable SPACE_HOST: comma-separated names."""
        self._allowed = frozenset(allowed)
        named = [socket.gethostname(), public_host or "", *space_host.split(",")]
        self._own = {host_name(name.strip()) for name in named}
        self._full_name: asyncio.Task[str] | None = None

    async def serve(self, header: str) -> bool:
        """Whether the host in this header is served."""
        name = host_name(header)
        if name is None:
            return False
        local = "." not in name or is_address(name) or name.endswith(LOCAL_SUFFIXES)
        return local or name in self._own or self._is_allowed(name) or await self._is_full(name)

    def _is_allowed(self, name: str) -> bool:
        parents = (f"*.{name[at + 1 :]}" for at, letter in enumerate(name) if letter == ".")
        return not self._allowed.isdisjoint((name, "*", *parents))

    async def _is_full(self, name: str) -> bool:
        """Whether it is the machine's full name. DNS may be slow: it is queried once, on demand."""
        if self._full_name is None:
            self._full_name = asyncio.create_task(asyncio.to_thread(full_name))
        return name == host_name(await asyncio.shield(self._full_name))


def full_name() -> str:
    """The machine's name with its domain; empty if unknown."""
    with contextlib.suppress(OSError, UnicodeError):
        return socket.getfqdn()
    return ""


class OwnHost:
    """Refuses requests for a host that is not served with 421, except to the probes.

    `X-Forwarded-Host` counts if it comes from a trusted proxy; then all hosts in it must be served,
    too, since a proxy may have passed on a caller's claim.
    """

    def __init__(self, app: ASGIApp, hosts: ServedHosts, trusted_proxies: str = "") -> None:
        """`trusted_proxies` is the setting of this name; this layer must be outside the one that
        replaces the proxy's address by that of `X-Forwarded-For`."""
        self.app = app
        self._hosts = hosts
        proxies = [part.strip() for part in trusted_proxies.split(",") if part.strip()]
        self._trust_all = "*" in proxies
        self._trusted = [ipaddress.ip_network(part) for part in proxies if part != "*"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = await self._refused(scope)
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in PROBES:
            await self.app({**scope, UNSERVED: True}, receive, send)
        else:
            await explained_refusal(scope, 421, refused)(scope, receive, send)

    async def _refused(self, scope: Scope) -> str | None:
        """Why the request is refused; None when it is not."""
        headers = Headers(scope=scope)
        own = headers.getlist("host")
        if len(own) != 1:
            return f"Expected one Host header, got {len(own)}."
        forwarded = ",".join(headers.getlist("x-forwarded-host") if self._trusts(scope) else ())
        for host in (own[0], *filter(None, map(str.strip, forwarded.split(",")))):
            if not await self._hosts.serve(host):
                return unserved_reason(host)
        return None

    def _trusts(self, scope: Scope) -> bool:
        if self._trust_all:
            return True
        host = (scope.get("client") or ("",))[0]
        if not is_address(host):
            return False
        address = ipaddress.ip_address(host)
        return any(address in network for network in self._trusted)


def unserved_reason(host: str) -> str:
    """Why a host is not served, and what to do if it should be."""
    name = host_name(host)
    if name is None:
        return f"Expected a Host header that names a host, got {host!r}."
    return (
        f"This server has no login and does not know itself as {name}. If that is its name, start"
        f" it with MOCHI_ALLOWED_HOSTS={name}, or with a login (MOCHI_AUTH_FILE): then any name"
        " will do."
    )


@dataclass(frozen=True)
class RootPath:
    """The value of GRADIO_ROOT_PATH: the path, without a trailing slash, and the host, if any."""

    value: str
    path: str
    host: str | None


def root_path() -> RootPath:
    """Read GRADIO_ROOT_PATH: a path or a whole address.

    Raises:
        SettingsError: it is neither.
    """
    value = os.environ.get("GRADIO_ROOT_PATH", "").rstrip("/")
    with contextlib.suppress(ValueError):
        parts = urlsplit(value)
        host = host_name(parts.netloc)
        is_path = not parts.scheme and not parts.netloc
        is_url = parts.scheme in ("http", "https") and host is not None
        whole = not parts.query and not parts.fragment and PATH.fullmatch(parts.path)
        if (is_path or is_url) and whole:
            return RootPath(value, parts.path, host)
    raise SettingsError(
        f"GRADIO_ROOT_PATH={value!r}: expected a path such as /mochi, or an address such as"
        " https://mochi.example/mochi"
    )


class UnderPrefix:
    """Strips the prefix from a request's path if the proxy has not."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path == self._prefix:
            query = scope["query_string"].decode("latin-1")
            page = f"{path.rsplit('/', 1)[1]}/{query and '?'}{query}"  # the proxy may add a prefix
            await RedirectResponse(page)(scope, receive, send)
        elif path.startswith(f"{self._prefix}/"):
            await self.app({**scope, "path": path.removeprefix(self._prefix)}, receive, send)
        else:
            await self.app(scope, receive, send)
