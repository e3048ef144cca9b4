"""Authentication: login, API token, anonymous browsers, the app's own tickets.

One ASGI layer in front of all routes, ours and Gradio's, decides once per request and stores the
`Caller` in its scope. With an accounts file, unauthenticated requests are refused, except to the
probes and the login itself. Without one everybody has access, and a signed cookie distinguishes
browsers, so that each can stop and delete its own jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mochi_app.accounts import Account, Accounts
from mochi_app.callers import ANONYMOUS, MACHINE, Caller
from mochi_app.files import sync
from mochi_app.jobs import JOB_ID
from mochi_app.request import safe_repr
from mochi_app.settings import Settings, SettingsError
from mochi_app.store.logins import EndedLogins
from mochi_app.web.middleware import refusal
from mochi_app.web.revocation import while_let_in
from mochi_app.web.throttle import Throttle, address_of
from mochi_app.web.tickets import ENDPOINT, SECRET_HEADER

log = logging.getLogger(__name__)

KEY_FILE = "secret.key"  # in the data folder
KEY_BYTES = 32
LOGIN_SECONDS = 30 * 86400
VISITOR_SECONDS = 400 * 86400  # as long as browsers keep a cookie; renewed at each visit
CHECKS_AT_ONCE = 2  # password checks; each takes 16 MiB and a core
CHECKS_WAITING = 16  # further logins are refused
MAX_COOKIE = 1024  # characters

SCOPE_KEY = "mochi.caller"
OPEN_PATHS = frozenset({"/livez", "/healthz", "/login", "/logout", "/favicon.ico", "/robots.txt"})
TICKET_PATH = re.compile(rf"/gradio_api/call/{ENDPOINT}(/[^/]+)?")


def caller_of(request: Any) -> Caller:
    """The caller of a FastAPI or Gradio request; an unnamed one if it did not pass `Guard`."""
    connection = getattr(request, "request", None) or request
    return getattr(connection, "scope", {}).get(SCOPE_KEY) or Caller()


def is_stranger(request: Request) -> bool:
    """Whether the caller has not logged in although this server requires it."""
    return request.scope.get(SCOPE_KEY) is None


def user_of(request: Request) -> str | None:
    """For Gradio's `auth_dependency`: None is refused."""
    caller: Caller | None = request.scope.get(SCOPE_KEY)
    if caller is None:
        return None
    return "" if caller.anonymous else caller.name


def load_key(folder: Path) -> bytes:
    """The key that signs cookies, created at the first start and readable only by its owner.

    Raises:
        SettingsError: the file is not a key.
        OSError: it cannot be read or created.
    """
    path = folder / KEY_FILE
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            sync(file.fileno())
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise SettingsError(
            f"{path}: got {len(key)} bytes, expected {KEY_BYTES}. Remove it: a new one is made,"
            " and everybody logs in anew"
        )
    if path.stat().st_mode & 0o077:
        log.warning("%s could be read by others: closed", path)
        path.chmod(0o600)
    return key


@dataclass(frozen=True, slots=True)
class Login:
    """A login that has not ended; `since` is in seconds since 1970."""

    account: Account
    id: str
    since: float


class Auth:
    """Authenticates requests. `closed` with an accounts file: then a login is required.

    Raises:
        SettingsError: the accounts file, or the key, cannot be used.
        OSError: the key cannot be read or created.
    """

    def __init__(self, settings: Settings, ticket_secret: str) -> None:
        token = settings.api_token
        self._accounts = Accounts(settings.auth_file) if settings.auth_file else None
        self._token = token.get_secret_value().strip().encode() if token else None
        self._ticket_secret = ticket_secret.encode()
        key = load_key(settings.data_dir)
        # Servers on one host see each other's cookies: each has its own names.
        mark = hashlib.sha256(key).hexdigest()[:8]
        self.login_cookie = f"mochi-login-{mark}"
        self.visitor_cookie = f"mochi-visitor-{mark}"
        self._logins = serializer(key, "login")
        self._visitors = serializer(key, "visitor")
        self._ended = EndedLogins(settings.data_dir)
        self._throttle = Throttle()
        self._checks = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._waiting = 0

    @property
    def closed(self) -> bool:
        """Whether a login is required."""
        return self._accounts is not None

    @property
    def problem(self) -> str | None:
        """Why somebody who should have access does not, for `/healthz`."""
        if self._accounts is None:
            return None
        if self._accounts.empty and self._token is None:
            return "accounts: there are none, and no API token, so nobody can come in"
        return self._accounts.problem

    def caller(self, connection: HTTPConnection) -> Caller | None:
        """The caller; None if a login is required and missing."""
        headers = connection.headers
        for_ticket = TICKET_PATH.fullmatch(connection.scope["path"])
        if for_ticket and same(headers.get(SECRET_HEADER), self._ticket_secret):
            return Caller()
        if self._token is not None and same(bearer(headers.get("authorization")), self._token):
            return Caller(MACHINE, admin=True)
        if self._accounts is not None:
            return self._logged_in(self._accounts, connection)
        return Caller(self._visitor(connection) or "")

    def _logged_in(self, accounts: Accounts, connection: HTTPConnection) -> Caller | None:
        login = self._login(accounts, connection)
        # After the clock was set back, a login may be in the future. It is still valid.
        if login is None or abs(time.time() - login.since) > LOGIN_SECONDS:
            return None
        return Caller(login.account.name, login.account.admin)

    def _login(self, accounts: Accounts, connection: HTTPConnection) -> Login | None:
        """The login in the request's cookie, however old, unless it was ended: by a logout, or
        because its account is gone or has another password."""
        match signed(self._logins, connection.cookies.get(self.login_cookie)):
            case [str(name), str(mark), int(series), str(login)], float(since):
                account = accounts.find(name)
                if account is None or not same(mark, account.password.mark.encode()):
                    return None
                if not self._ended.has(name, series, login):
                    return Login(account, login, since)
        return None

    def _visitor(self, connection: HTTPConnection) -> str | None:
        """The name in the cookie, however old: it only gives access to the browser's own jobs, and
        a browser that loses it loses these."""
        match signed(self._visitors, connection.cookies.get(self.visitor_cookie)):
            case str(name), _ if name.startswith(ANONYMOUS):
                return name
        return None

    def welcome(self, connection: HTTPConnection) -> str:
        """The Set-Cookie header that identifies a browser as one visitor, or renews that."""
        name = self._visitor(connection) or ANONYMOUS + secrets.token_hex(8)
        response = Response()
        self.set_cookie(
            response, connection, self.visitor_cookie, self._visitors.dumps(name), VISITOR_SECONDS
        )
        return response.headers["set-cookie"]

    async def log_in(self, connection: HTTPConnection, name: str, password: str) -> Account:
        """The account, if name and password are correct.

        Raises:
            LoginRefused: they are not, or this address has tried too often.
        """
        assert self._accounts is not None
        address = address_of(connection)
        if self._accounts.problem:
            raise LoginRefused(503, "the accounts cannot be read: ask who runs this server")
        if self._waiting >= CHECKS_WAITING:
            raise LoginRefused(503, "too many log in at the moment: try again", 2)
        if wait := self._throttle.take(address):
            raise LoginRefused(429, f"too many tries: wait {wait:.0f} seconds", wait)
        self._waiting += 1
        try:
            async with self._checks:
                account = await asyncio.to_thread(self._accounts.check, name, password)
        finally:
            self._waiting -= 1
        if account is None:
            log.warning("login refused for %s from %s", safe_repr(name), address)
            raise LoginRefused(401, "name or password is wrong")
        self._throttle.give_back(address)
        log.info("%s logged in from %s", account.name, address)
        return account

    def remember(self, response: Response, connection: HTTPConnection, account: Account) -> None:
        """Set the cookie of a new login on the response."""
        name, login = account.name, secrets.token_urlsafe(12)
        value = self._logins.dumps([name, account.password.mark, self._ended.series(name), login])
        self.set_cookie(response, connection, self.login_cookie, value, LOGIN_SECONDS)

    async def log_out(self, connection: HTTPConnection) -> None:
        """End the request's login, including any copies of its cookie."""
        login = self._login(self._accounts, connection) if self._accounts is not None else None
        if login is not None:
            name = login.account.name
            await self._ended.add(name, login.id, login.since + LOGIN_SECONDS)
            log.info("%s logged out", name)

    def set_cookie(
        self, response: Response, connection: HTTPConnection, name: str, value: str, seconds: int
    ) -> None:
        """Set a cookie that scripts cannot read and other sites' pages do not send."""
        forwarded = connection.headers.get("x-forwarded-proto", "").split(",")[0].strip()
        secure = "https" in (connection.scope.get("scheme"), forwarded)
        response.set_cookie(
            name, value, max_age=seconds, httponly=True, samesite="lax", secure=secure
        )


def same(given: str | None, secret: bytes) -> bool:
    """Whether the secret was given, compared in constant time."""
    return given is not None and hmac.compare_digest(given.encode("utf-8", "replace"), secret)


def bearer(header: str | None) -> str | None:
    """The token of a Bearer Authorization header; the scheme in any case (RFC 9110, 11.1)."""
    match (header or "").split(maxsplit=1):
        case [scheme, token] if scheme.lower() == "bearer":
            return token.strip()
    return None


def serializer(key: bytes, purpose: str) -> URLSafeTimedSerializer:
    """Signs small JSON values with the time; a signature is valid for one purpose only."""
    return URLSafeTimedSerializer(
        key,
        salt=f"mochi.{purpose}",
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )


def signed(serializer: URLSafeTimedSerializer, cookie: str | None) -> tuple[Any, float] | None:
    """The signed value and when it was signed (seconds since 1970); None if it is not valid."""
    if not cookie or len(cookie) > MAX_COOKIE or not cookie.isascii():
        return None
    try:
        value, when = serializer.loads(cookie, return_timestamp=True)
    except BadData:
        return None
    return value, when.timestamp()


class Guard:
    """The layer in front of all routes: finds the caller, and refuses requests without one."""

    def __init__(self, app: ASGIApp, auth: Auth) -> None:
        self.app = app
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        caller = scope[SCOPE_KEY] = self._auth.caller(connection)
        path, method = scope["path"], scope.get("method")
        if caller is None and path not in OPEN_PATHS:
            await self._refuse(scope, receive, send)
        elif caller is not None and method == "GET" and self._auth.closed:
            let_in = functools.partial(self._let_in, connection, caller.name)
            if not await while_let_in(let_in, self.app, scope, receive, send):
                await self._refuse(scope, receive, send)
        elif path == "/" and method == "GET" and not self._auth.closed:
            await self.app(scope, receive, self._welcoming(connection, send))
        else:
            await self.app(scope, receive, send)

    def _let_in(self, connection: HTTPConnection, name: str) -> bool:
        """Whether the caller of that name still has access."""
        caller = self._auth.caller(connection)
        return caller is not None and caller.name == name

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            job = HTTPConnection(scope).query_params.get("job", "")
            back = f"?job={job}" if JOB_ID.fullmatch(job) else ""
            await RedirectResponse(f"login{back}", 303)(scope, receive, send)
        else:
            detail = "log in at /login, or send the header Authorization: Bearer with the API token"
            await refusal(401, detail, www_authenticate="Bearer")(scope, receive, send)

    def _welcoming(self, connection: HTTPConnection, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                MutableHeaders(scope=message).append("set-cookie", self._auth.welcome(connection))
            await send(message)

        return sending


class LoginRefused(Exception):
    """A login was refused with this HTTP status; `retry` is in seconds."""

    def __init__(self, status: int, detail: str, retry: float = 0.0) -> None:
        super().__init__(detail)
        self.status = status
        self.retry = retry
