"""Who comes in and what is whose: accounts, cookies, tokens, tickets, origins, sizes, owners."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

import app
from mochi_app import accounts, logs
from mochi_app.accounts import Account, Accounts, AccountsError, PasswordHash
from mochi_app.callers import Caller
from mochi_app.request import NotYours
from mochi_app.settings import Settings, SettingsError, load_settings
from mochi_app.slots.pool import Pool
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.studio import Studio
from mochi_app.web import auth as doors
from mochi_app.web import middleware as guards
from mochi_app.web.auth import Doors
from mochi_app.web.throttle import Throttle, address_of
from mochi_app.web.tickets import SECRET_HEADER
from tests.conftest import eventually, fake_engine, quick_settings, tiny_defaults
from tests.serving import Served

MakeStudio = Callable[..., Awaitable[Studio]]

TOKEN = "a token of more than twenty characters"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SALT = b"salt of a test"


def cheap(password: str) -> PasswordHash:
    """A hash that costs nothing to check."""
    return PasswordHash(2, 1, 1, SALT, accounts.derive(password, 2, 1, 1, SALT))


@pytest.fixture
def auth_file(tmp_path: Path) -> Path:
    """Ann, and Ada the admin. Their passwords are `NAME's password`."""
    path = tmp_path / "accounts"
    people = [Account("ann", cheap("ann's password"))]
    people.append(Account("ada", cheap("ada's password"), admin=True))
    path.write_text("# the team\n\n" + "".join(f"{person}\n" for person in people))
    return path


# Accounts


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ann", "expected name:hash"),
        ("ann:x:y:z", "expected name:hash"),
        ("ann:x:root", "expected name:hash"),
        (f"anon-1:{cheap('p')}", "a name of 1 to 64"),
        (f"api:{cheap('p')}", "a name of 1 to 64"),
        (f"a b:{cheap('p')}", "a name of 1 to 64"),
        (f":{cheap('p')}", "a name of 1 to 64"),
        ("ann:plain password", "the hash of ann: expected scrypt"),
        (f"ann:{str(cheap('p')).replace('$2$', '$3$', 1)}", "a power of two"),
        (f"ann:{str(cheap('p')).replace('$2$', '$1073741824$', 1)}", "up to 262144"),
        (f"ann:{str(cheap('p'))[:-8]}!!!!", "base64"),
        (f"ann:{cheap('p')}\nann:{cheap('p')}", "line 2: ann has a line already"),
    ],
)
def test_a_bad_line_is_named_and_shows_no_hash(line: str, told: str) -> None:
    with pytest.raises(AccountsError, match=re.escape(told)) as error:
        accounts.parse_accounts(line)
    assert str(error.value).startswith("line ")
    assert "plain password" not in str(error.value)


def test_accounts_are_added_changed_and_removed_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accounts"

    def command(typed: str, *words: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return accounts.main(["--file", str(path), *words])

    assert command("first password\n", "add", "ann") == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert "first" not in path.read_text()
    path.write_text("# a remark\n" + path.read_text())
    assert command("other password\n", "add", "ada", "--admin") == 0
    assert command("second password\n", "add", "ann") == 0
    known = Accounts(path)
    assert known.check("ann", "first password") is None
    assert (found := known.check("ann", "second password"))
    assert not found.admin
    assert (found := known.find("ada"))
    assert found.admin
    assert path.read_text().startswith("# a remark\n")
    assert command("", "remove", "ann") == 0
    assert known.find("ann") is None
    assert command("short\n", "add", "bob") == 2
    assert "password: got 5 characters, expected 8" in capsys.readouterr().err
    assert command("long enough\n", "add", "anon-1") == 2
    assert command("", "remove", "ann") == 2


def test_the_command_takes_the_file_of_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("long enough\n"))
    assert accounts.main(["add", "ann"]) == 2
    monkeypatch.setenv("MOCHI_AUTH_FILE", str(tmp_path / "accounts"))
    assert accounts.main(["add", "ann"]) == 0
    assert Accounts(tmp_path / "accounts").find("ann")


def test_a_file_that_goes_bad_leaves_in_force_what_was_read(
    auth_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Accounts(auth_file)
    auth_file.write_text("ann")
    assert known.find("ann")
    assert "the ones read before stay in force" in caplog.text
    auth_file.unlink()
    assert known.find("ann")
    with pytest.raises(AccountsError, match="accounts in"):
        Accounts(auth_file)


@pytest.mark.parametrize(
    ("caller", "owned"),
    [
        (Caller(), {""}),
        (Caller("ann"), {"", "ann"}),
        (Caller("anon-1"), {"", "anon-1"}),
        (Caller("ada", admin=True), {"", "ann", "bob", "anon-1"}),
    ],
)
def test_what_is_whose(caller: Caller, owned: set[str]) -> None:
    assert {name for name in ("", "ann", "bob", "anon-1") if caller.owns(name)} == owned


def test_tries_run_out_and_come_back() -> None:
    now = 0.0
    throttle = Throttle(tries=2, seconds=8, clock=lambda: now)
    assert [throttle.take("a"), throttle.take("a")] == [0, 0]
    assert throttle.take("a") == 8
    assert throttle.take("b") == 0
    throttle.give_back("b")
    assert [throttle.take("b"), throttle.take("b")] == [0, 0]
    now = 4.0
    assert throttle.take("a") == 4
    now = 8.0
    assert [throttle.take("a"), throttle.take("a")] == [0, 8]


def test_many_addresses_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "MAX_ADDRESSES", 3)
    throttle = Throttle()
    for number in range(10):
        throttle.take(str(number))
    assert len(throttle._spent) == 3


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.1", "10.0.0.1"), ("2001:db8::1:2", "2001:db8::/64"), ("unix", "unix"), (None, "")],
)
def test_an_address_is_a_client(host: str | None, address: str) -> None:
    scope = {"type": "http", "client": host and (host, 1)}
    assert address_of(HTTPConnection(scope)) == address


# Cookies, tokens, tickets


def test_the_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    key = doors.load_key(tmp_path)
    path = tmp_path / "secret.key"
    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    path.chmod(0o644)
    assert doors.load_key(tmp_path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(SettingsError, match="got 5 bytes, expected 32"):
        doors.load_key(tmp_path)


def settings_in(folder: Path, **overrides: Any) -> Settings:
    folder.mkdir(exist_ok=True)
    return load_settings(data_dir=folder, **overrides)


def coming(path: str = "/events", **headers: str) -> HTTPConnection:
    """A request with these headers."""
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return HTTPConnection({"type": "http", "path": path, "headers": raw})


def cookie_of(door: Doors, account: Account) -> str:
    """What a browser sends after this login."""
    response = PlainTextResponse()
    door.remember(response, coming(), account)
    return response.headers["set-cookie"].split(";")[0]


def test_a_login_lasts_until_password_or_account_change(tmp_path: Path, auth_file: Path) -> None:
    door = Doors(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
    ann = Accounts(auth_file).find("ann")
    assert ann is not None
    cookie = cookie_of(door, ann)
    assert door.caller(coming(cookie=cookie)) == Caller("ann")
    lines = auth_file.read_text()
    auth_file.write_text(f"{Account('ann', cheap('another'))}\n")
    assert door.caller(coming(cookie=cookie)) is None
    auth_file.write_text(lines + "#\n")
    assert door.caller(coming(cookie=cookie)) == Caller("ann")
    auth_file.write_text("# nobody\n")
    assert door.caller(coming(cookie=cookie)) is None


async def test_a_logout_ends_one_login_wherever_its_cookie_was_copied(
    tmp_path: Path, auth_file: Path
) -> None:
    settings = settings_in(tmp_path / "data", auth_file=auth_file)
    door = Doors(settings, "ticket")
    known = Accounts(auth_file)
    ann, ada = known.find("ann"), known.find("ada")
    assert ann is not None
    assert ada is not None
    here, there, other = (cookie_of(door, account) for account in (ann, ann, ada))
    for _ in range(2):
        await door.log_out(coming(cookie=here))
    await door.log_out(coming(cookie=f"{door.login_cookie}=forged"))
    await door.log_out(coming())
    for asked in (door, Doors(settings, "after a restart")):
        assert asked.caller(coming(cookie=here)) is None
        assert asked.caller(coming(cookie=there)) == Caller("ann")
        assert asked.caller(coming(cookie=other)) == Caller("ada", admin=True)
        assert asked.caller(coming(cookie=cookie_of(asked, ann))) == Caller("ann")


async def test_a_logout_counts_whatever_the_clock_says(
    tmp_path: Path, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    door = Doors(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
    ann = Accounts(auth_file).find("ann")
    assert ann is not None
    cookie = cookie_of(door, ann)
    now += 40 * 86400
    await door.log_out(coming(cookie=cookie))
    now -= 40 * 86400
    assert door.caller(coming(cookie=cookie)) is None


def test_a_login_is_as_old_as_the_clock_says_either_way(
    tmp_path: Path, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    door = Doors(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
    ann = Accounts(auth_file).find("ann")
    assert ann is not None
    cookie = cookie_of(door, ann)
    began = now
    for days, known in ((0, True), (-29, True), (29, True), (-31, False), (31, False), (0, True)):
        now = began + days * 86400
        assert (door.caller(coming(cookie=cookie)) == Caller("ann")) is known, days


def test_a_browser_keeps_its_name_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    door = Doors(settings_in(tmp_path / "data"), "ticket")
    cookie = door.welcome(coming()).split(";")[0]
    caller = door.caller(coming(cookie=cookie))
    began = now
    for days in (-3 / 86400, -5000, 5000, 0):
        now = began + days * 86400
        assert door.caller(coming(cookie=cookie)) == caller, days
        cookie = door.welcome(coming(cookie=cookie)).split(";")[0]


def test_no_other_cookie_logs_in(tmp_path: Path, auth_file: Path) -> None:
    door = Doors(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
    other = Doors(settings_in(tmp_path / "other", auth_file=auth_file), "ticket")
    ada = Accounts(auth_file).find("ada")
    assert ada is not None
    good = cookie_of(door, ada).split("=", 1)[1]
    named = door.login_cookie
    visitor = door._visitors.dumps(["ada", ada.password.mark])
    foreign = cookie_of(other, ada).split("=", 1)[1]
    plain = '["ada","' + ada.password.mark + '"]'
    changed = ("A" if good[0] != "A" else "B") + good[1:]
    for forged in (foreign, visitor, plain, changed, good[:-2], good + "x" * 2000, "", "é", "."):
        assert door.caller(coming(cookie=f"{named}={forged}")) is None, forged
    assert door.caller(coming(cookie=f"x=1; {named}={good}")) == Caller("ada", admin=True)


def test_an_open_door_knows_browsers_by_a_signed_cookie(tmp_path: Path) -> None:
    door = Doors(settings_in(tmp_path / "data"), "ticket")
    first = door.welcome(coming())
    assert "HttpOnly" in first
    assert "SameSite=lax" in first
    assert "Secure" not in first
    assert "Secure" in door.welcome(coming(x_forwarded_proto="https"))
    cookie = first.split(";")[0]
    known = door.caller(coming(cookie=cookie))
    assert known is not None
    assert re.fullmatch("anon-[0-9a-f]{16}", known.name)
    again = door.welcome(coming(cookie=cookie)).split(";")[0]
    assert door.caller(coming(cookie=again)) == known
    assert door.caller(coming(cookie=cookie[:-3])) == door.caller(coming()) == Caller()


def test_the_token_is_an_admins_and_the_secret_a_tickets_only(
    tmp_path: Path, auth_file: Path
) -> None:
    settings = settings_in(tmp_path / "data", auth_file=auth_file, api_token=TOKEN)
    door = Doors(settings, "ticket")
    assert door.caller(coming(**BEARER)) == Caller("api", admin=True)
    for right in (f"bearer {TOKEN}", f"BEARER  {TOKEN}", f"bEaReR \t{TOKEN}  "):
        assert door.caller(coming(authorization=right)) == Caller("api", admin=True), right
    for wrong in (
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        f"Bearer{TOKEN}",
        TOKEN,
        "Bearer ",
        "",
        "é",
    ):
        assert door.caller(coming(authorization=wrong)) is None
    turn = "/gradio_api/call/engine_turn"
    for path in (turn, f"{turn}/event"):
        assert door.caller(coming(path, x_mochi_ticket="ticket")) == Caller()
        assert door.caller(coming(path, x_mochi_ticket="ticket2")) is None
    for path in (
        "/events",
        "/gradio_api/call/submit_job",
        f"{turn}/event/more",
        "/gradio_api/info",
    ):
        assert door.caller(coming(path, x_mochi_ticket="ticket")) is None
    assert SECRET_HEADER == "x-mochi-ticket"


def test_a_short_token_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"MOCHI_API_TOKEN=…: .*20") as error:
        load_settings(api_token="hunter2")
    assert "hunter2" not in str(error.value)
    assert TOKEN not in repr(load_settings(api_token=TOKEN))


@pytest.mark.parametrize("value", ["example.org", "https://a/b", "*", "https://", "ftp://a"])
def test_an_origin_is_scheme_and_host(value: str) -> None:
    with pytest.raises(SettingsError, match="expected origins such as"):
        load_settings(allowed_origins=value)
    assert load_settings(allowed_origins="HTTPS://A.b:8443, http://[::1]").allowed_origins == (
        "https://a.b:8443",
        "http://[::1]",
    )


# Guards


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body."""
    body = b""
    if scope["method"] == "POST":
        body = (await receive())["body"]
    await PlainTextResponse(body)(scope, receive, send)


def asking(guard: Any, host: str = "http://mochi.example") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url=host)


@pytest.mark.parametrize(
    ("method", "path", "headers", "passes"),
    [
        ("POST", "/", {}, True),  # no browser
        ("POST", "/", {"origin": "http://mochi.example"}, True),
        ("POST", "/", {"origin": "http://mochi.example:80"}, True),
        ("POST", "/", {"origin": "http://mochi.example:8080"}, True),  # the Host lost its port
        ("POST", "/", {"origin": "https://Mochi.example.:8443"}, True),
        ("POST", "/", {"origin": "http://mochi.example.evil:8080"}, False),
        ("POST", "/", {"origin": "http://mochi.example:8080", "host": "mochi.example:80"}, False),
        ("POST", "/", {"origin": "http://mochi.example:x", "host": "mochi.example"}, False),
        (  # what the browser says itself needs no guess
            "POST",
            "/",
            {"origin": "https://mochi.example:8443", "sec-fetch-site": "same-site"},
            False,
        ),
        ("POST", "/", {"origin": "http://[::1]:8882", "host": "[::1]"}, True),
        ("POST", "/", {"origin": "http://[::2]:8882", "host": "[::1]"}, False),
        ("POST", "/", {"origin": "http://gpubox:8882", "x-forwarded-host": "gpubox"}, True),
        ("POST", "/", {"origin": "http://evil:8882", "x-forwarded-host": "gpubox"}, False),
        ("GET", "/assets/index-1.js", {"origin": "http://evil.example"}, True),
        ("GET", "/static/a.js", {"origin": "null", "sec-fetch-site": "cross-site"}, True),
        ("HEAD", "/theme.css", {"origin": "http://evil.example"}, True),
        ("POST", "/assets/index-1.js", {"origin": "http://evil.example"}, False),
        ("GET", "/assets", {"origin": "http://evil.example"}, False),
        ("GET", "/config", {"origin": "http://evil.example"}, False),
        ("POST", "/", {"origin": "http://evil.example"}, False),
        ("GET", "/", {"origin": "http://evil.example"}, False),
        ("POST", "/", {"origin": "null"}, False),
        ("POST", "/", {"origin": "http://[nonsense"}, False),
        ("POST", "/", {"origin": "https://friend.example"}, True),
        ("POST", "/", {"origin": "https://public.example"}, True),
        (
            "POST",
            "/",
            {"origin": "https://front.example", "x-forwarded-host": "front.example"},
            True,
        ),
        ("POST", "/", {"origin": "https://front.example", "sec-fetch-site": "same-origin"}, True),
        ("POST", "/", {"sec-fetch-site": "cross-site"}, False),
        ("GET", "/", {"sec-fetch-site": "cross-site"}, True),  # a link
        ("GET", "/logout", {"sec-fetch-site": "cross-site"}, False),
    ],
)
async def test_only_our_own_page_and_friends_call(
    method: str, path: str, headers: dict[str, str], passes: bool
) -> None:
    guard = guards.OwnOrigin(echo, ("https://friend.example",), "https://public.example/mochi")
    async with asking(guard) as client:
        answer = await client.request(method, path, headers=headers)
    assert answer.status_code == (200 if passes else 403)


async def test_a_page_behind_a_proxy_without_host_is_told_what_to_pass_on() -> None:
    page = {"origin": "http://gpubox:8882", "host": "127.0.0.1:7860"}
    async with asking(guards.OwnOrigin(echo)) as client:
        told = (await client.post("/", headers=page)).json()["detail"]
        form = await client.post("/login", headers=page | {"accept": "text/html,*/*;q=0.8"})
    for part in ("http://gpubox:8882", "127.0.0.1:7860", "Host header", "docs/operations.md"):
        assert part in told
    assert form.status_code == 403
    assert form.headers["content-type"].startswith("text/html")
    assert "proxy_set_header Host $http_host" in form.text
    assert "http://gpubox:8882" in form.text


async def test_what_a_refusal_repeats_is_text() -> None:
    marked = {"origin": "http://<script>alert(1)</script>", "accept": "text/html"}
    async with asking(guards.OwnOrigin(echo)) as client:
        answer = await client.post("/login", headers=marked)
    assert "<script" not in answer.text


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"x" * guards.MAX_BODY_BYTES, "text/plain", 200),
        (b"x" * (guards.MAX_BODY_BYTES + 1), "text/plain", 413),
        (b"[" * 100_000, "application/json", 400),
        (json.dumps({"data": [{"deep": [FILE]}]}).encode(), "application/json", 422),
        (json.dumps(FILE).replace("gradio", "\\u0067radio").encode(), "text/plain", 422),
        (b'{"path": "/etc/passwd", "meta": {}}', "application/json", 200),
        (b"\xff\xfe", "application/json", 200),  # its route's to refuse
        (b"--x--", "Multipart/Form-Data; boundary=x", 415),
        (b"--x--", " multipart/mixed;boundary=x", 415),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
async def test_what_no_caller_needs_to_send_is_refused(
    body: bytes, kind: str, status: int, chunked: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), 60_000):
            yield body[begin : begin + 60_000]

    async with asking(guards.BoundedBody(echo)) as client:
        content: Any = chunks() if chunked else body
        answer = await client.post("/", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    if status == 200:
        assert answer.content == body


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/login", "multipart/form-data; boundary=x", 200),
        ("/login", "Multipart/FORM-data;boundary=x", 200),
        ("/login", "multipart/mixed; boundary=x", 415),
        ("/login/", "multipart/form-data; boundary=x", 415),
        ("/logout", "multipart/form-data; boundary=x", 415),
        ("/gradio_api/upload", "multipart/form-data; boundary=x", 415),
    ],
)
async def test_only_the_login_takes_multipart(path: str, kind: str, status: int) -> None:
    async with asking(guards.BoundedBody(echo)) as client:
        answer = await client.post(path, content=b"--x--", headers={"content-type": kind})
    assert answer.status_code == status


async def test_a_long_body_is_not_read_to_its_end() -> None:
    read = 0

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 65536, "more_body": True}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await guards.BoundedBody(echo)(scope, receive, send)
    assert (sent[0]["status"], read) == (413, 5)


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_SECONDS", 0.01)
    with pytest.raises(guards.BadBody, match="did not come") as error:
        await guards.whole_body(Headers(), asyncio.Event().wait)  # type: ignore[arg-type]
    assert error.value.status == 408


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/upload_progress"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("POST", "/gradio_api/stream/event"),
        ("GET", "/gradio_api/stream/a/b/1/playlist.m3u8"),
        ("GET", "/gradio_api/deep_link"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/token"),
        ("GET", "/gradio_api/custom_component/a/b/c/d"),
        ("GET", "/monitoring"),
        ("GET", "/openapi.json"),
        ("POST", "/"),
        ("DELETE", "/gradio_api/queue/join"),
    ],
)
def test_the_rest_of_gradio_is_not_there(method: str, path: str) -> None:
    assert not guards.needed(method, path)


async def test_headers_that_protect_a_browser() -> None:
    guard = guards.SecurityHeaders(echo, ("https://huggingface.co",))
    async with asking(guard) as client:
        headers = (await client.get("/")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert policy.endswith("frame-ancestors 'self' https://huggingface.co")
    assert "http:" not in policy


# Log


def test_what_is_written_to_stderr_becomes_lines_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = logs.LoggedLines(behind := io.StringIO())
    for part in ("Trace", "back\nValueError: \x1b[2J\n2026 ERROR forged\n", "not yet"):
        stream.write(part)
    assert caplog.messages == ["Traceback", "ValueError: \x1b[2J", "2026 ERROR forged"]
    stream._busy = True
    stream.write("\x1b[2J")
    assert behind.getvalue() == "\\x1b[2J\n"


# Owners


async def test_only_owner_and_admin_stop_delete_and_restore(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    ann, bob, ada = Caller("ann"), Caller("bob"), Caller("ada", admin=True)
    for by in (ann, ada):
        job = await studio.submit(prompt="hers", owner="ann")
        with pytest.raises(NotYours, match=f"job {job.id} is ann's: only ann or an admin can canc"):
            await studio.cancel(job.id, by=bob)
        assert (await studio.cancel(job.id, by=by)).status == "CANCELLED"
        assert (await studio.cancel(job.id, by=bob)).status == "CANCELLED"  # ended: as it is
        with pytest.raises(NotYours, match="can delete it"):
            await studio.delete(job.id, by=bob)
        await studio.delete(job.id, by=by)
        with pytest.raises(NotYours, match="can restore it"):
            await studio.restore(job.id, by=bob)
        assert (await studio.restore(job.id, by=by)).deleted_at is None
        assert (await studio.star(job.id)).starred
    with pytest.raises(NotYours, match="only an admin can empty it"):
        await studio.empty_trash(by=ann)
    await studio.delete(job.id, by=ann)
    assert await studio.empty_trash(by=ada) == 1


async def test_another_browsers_job_is_left_alone_and_nobodys_is_everybodys(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio(turns=False)
    job = await studio.submit(prompt="theirs", owner="anon-1")
    for by in (Caller("anon-2"), Caller()):
        with pytest.raises(NotYours, match="another browser: cancel it there"):
            await studio.cancel(job.id, by=by)
    assert (await studio.cancel(job.id, by=Caller("anon-1"))).status == "CANCELLED"
    job = await studio.submit(prompt="nobody's")
    assert (await studio.cancel(job.id, by=Caller("anon-2"))).status == "CANCELLED"
    await studio.delete(job.id, by=Caller("anon-1"))
    assert await studio.empty_trash(by=Caller("anon-3")) == 1


# The whole app, in process

Web = Callable[..., Awaitable[SimpleNamespace]]


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Web]:
    """`await web(**settings)`: the app with a faked model; its `client`, `studio` and `app`."""
    ending: list[Callable[[], Awaitable[Any]]] = []

    async def start(**overrides: Any) -> SimpleNamespace:
        settings = quick_settings(**overrides)
        history = await History.open(settings.data_dir)
        media = MediaStore(settings.data_dir)
        pool = Pool(settings, media.scratch, command=fake_engine())
        studio = Studio(settings, tiny_defaults(settings), history, media, pool)
        built = app.build_web(studio, "the ticket secret")
        lifespan = built.router.lifespan_context(built)
        await lifespan.__aenter__()
        ending.append(lambda: lifespan.__aexit__(None, None, None))
        client = asking(built, "http://127.0.0.1")
        ending.append(client.aclose)
        return SimpleNamespace(app=built, client=client, studio=studio)

    yield start
    for end in reversed(ending):
        await end()


async def call(client: httpx.AsyncClient, name: str, **parameters: Any) -> Any:
    """One call; the answer, or the error's text."""
    base = "/gradio_api/call"
    posted = await client.post(f"{base}/v2/{name}", json=parameters)
    posted.raise_for_status()
    stream = await client.get(f"{base}/{name}/{posted.json()['event_id']}")
    event, data = stream.text.strip().split("\n\n")[-1].split("\n", 1)
    answer = json.loads(data.removeprefix("data: "))
    return answer[0] if event == "event: complete" else answer["error"]


def walk(routes: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those of mounted apps and included routers, too."""
    for route in routes:
        mounted: Any = route.app if isinstance(route, Mount) else None
        inner = getattr(route, "original_router", mounted)
        if inner is not None:
            yield from walk(inner.routes)
            continue
        for method in route.methods:
            yield method, re.sub(r"\{\w+(:path)?\}", "1", route.path)


# Reviewed: these tell nobody of a job.
OPEN = {"/livez", "/healthz", "/login", "/logout", "/favicon.ico", "/robots.txt"}


async def test_every_route_is_closed_to_strangers_and_tickets_still_run(
    web: Web, auth_file: Path
) -> None:
    running = await web(auth_file=auth_file, api_token=TOKEN)
    stranger = running.client
    async with asking(running.app, "http://127.0.0.1") as known:
        login = await known.post("/login", data={"username": "ann", "password": "ann's password"})
        assert login.json() == {"success": True}
        job = await call(known, "submit_job", prompt="slow and unheard", num_inference_steps=40)
        assert job["owner"] == "ann"
        routes = set(walk(running.app.routes))
        assert len(routes) > 80
        must = "/ /config /events /metrics /files/1 /gradio_api/app_id /gradio_api/queue/join"
        assert {path for _, path in routes} > set(must.split())
        for method, path in sorted(routes):
            asked = stranger.request(method, path, headers={SECRET_HEADER: "guessed"})
            answer = await asyncio.wait_for(asked, 10)
            told = answer.text
            for secret in (
                job["id"],
                "unheard",
                "pids",
                "Traceback",
                str(running.studio.media.videos),
            ):
                assert secret not in told, (method, path)
            if path in OPEN:
                assert answer.status_code < 500 or path == "/healthz", (method, path)
            elif path == "/":
                assert (answer.status_code, answer.headers["location"]) == (303, "login")
            else:
                assert answer.status_code in (401, 403), (method, path, answer.status_code)
        assert (await known.get("/healthz")).json()["slots"][0]["pids"]
        assert (await stranger.get("/metrics", headers=BEARER)).status_code == 200

        async def completed() -> bool:
            found = await call(known, "get_job_status", job_id=job["id"])
            return bool(found["status"] == "COMPLETED")

        await eventually(completed, "the video")


async def test_login_and_logout_in_a_browser(web: Web, auth_file: Path) -> None:
    client = (await web(auth_file=auth_file)).client
    job = "0" * 14 + "-" + "0" * 16
    html = {"accept": "text/html"}
    sent_on = await client.get(f"/?job={job}")
    assert sent_on.headers["location"] == f"login?job={job}"
    page = await client.get(f"/login?job={job}", headers=html)
    assert f'value="{job}"' in page.text
    assert "<script" not in (await client.get("/login?job=<script>")).text
    wrong = {"username": "<b>ann", "password": "x", "job": "//evil.example"}
    refused = await client.post("/login", data=wrong, headers=html)
    assert (refused.status_code, "name or password is wrong" in refused.text) == (401, True)
    right = {"username": "ann", "password": "ann's password", "job": job}
    entered = await client.post("/login", data=right, headers=html)
    assert (entered.status_code, entered.headers["location"]) == (303, f"./?job={job}")
    assert "HttpOnly" in entered.headers["set-cookie"]
    assert (await client.get("/")).status_code == 200
    copied = dict(client.cookies)
    left = await client.post("/logout")
    assert (left.status_code, left.headers["location"]) == (303, "login")
    assert (await client.get("/")).status_code == 303
    client.cookies.update(copied)
    assert (await client.get("/")).status_code == 303
    malformed = {"content-type": "multipart/form-data; boundary=x"} | html
    refused = await client.post("/login", content=b"--y", headers=malformed)
    assert (refused.status_code, "cannot be read as multipart" in refused.text) == (400, True)


async def test_guessing_is_slowed_down_and_long_names_are_no_trouble(
    web: Web, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "TRIES", 3)
    monkeypatch.setattr(Throttle.__init__, "__defaults__", (3, 20.0, lambda: 0.0))
    client = (await web(auth_file=auth_file)).client
    statuses = []
    for name in ("ann", "no" * 5000, "bob", "ann"):
        answer = await client.post("/login", data={"username": name, "password": "guess"})
        statuses.append(answer.status_code)
    assert statuses == [401, 401, 401, 429]
    assert answer.headers["retry-after"] == "20"
    for body in (b"", b"\xff", b"a=1&" * 100, b"username=ann"):
        answer = await client.post("/login", content=body)
        assert answer.status_code == 429


async def test_the_first_run_asks_for_nothing(web: Web) -> None:
    running = await web()
    page = await running.client.get("/")
    assert page.status_code == 200
    assert "mochi-visitor-" in page.headers["set-cookie"]
    assert str(running.studio.settings.data_dir) not in page.text
    mine = await call(running.client, "submit_job", prompt="slow", num_inference_steps=400)
    assert mine["owner"].startswith("anon-")
    async with asking(running.app, "http://127.0.0.1") as script:
        assert "another browser" in await call(script, "cancel_job", job_id=mine["id"])
        nobodys = await call(script, "submit_job", prompt="slow", num_inference_steps=400)
        assert nobodys["owner"] == ""
        answer = await script.post("/login", data={"username": "a", "password": "b"})
        assert answer.json() == {"success": True}  # Client(url, auth=…) works here, too
        parts = {"username": (None, "a"), "password": (None, "b")}
        answer = await script.post("/login", files=parts)
        assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert (await call(running.client, "cancel_job", job_id=nobodys["id"]))["owner"] == ""
    assert (await call(running.client, "cancel_job", job_id=mine["id"]))["id"] == mine["id"]


async def test_foreign_origins_get_no_leave_on_a_public_host(web: Web) -> None:
    running = await web(allowed_origins="https://friend.example")
    async with asking(running.app, "https://mochi.example") as client:
        for path in ("/", "/config", "/events", "/gradio_api/info"):
            answer = await client.get(path, headers={"origin": "https://evil.example"})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        ask = {"access-control-request-method": "POST"}
        evil = await client.options("/config", headers=ask | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in evil.headers
        friend = {"origin": "https://friend.example"}
        for answer in (
            await client.options("/config", headers=ask | friend),
            await client.get("/config", headers=friend),
        ):
            assert answer.headers["access-control-allow-origin"] == "https://friend.example"
            assert "access-control-allow-credentials" not in answer.headers


# A real server, for Gradio's client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("doors")
    people = [Account("ann", cheap("ann's password")), Account("bob", cheap("bob's password"))]
    (folder / "accounts").write_text("".join(f"{person}\n" for person in people))
    program = ("-m", "tests.faults.server", "ok")
    server = Served(folder / "data", program=program, MOCHI_AUTH_FILE=str(folder / "accounts"))
    yield server.start()
    server.end()


def test_gradios_client_logs_in_and_gets_its_video(served: Served) -> None:
    with pytest.raises(AuthenticationError):
        Client(served.url, verbose=False)
    with pytest.raises(AuthenticationError):
        Client(served.url, auth=("ann", "wrong"), verbose=False)
    client = Client(served.url, auth=("ann", "ann's password"), verbose=False)
    small = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 2}
    video = client.predict(prompt="a ring", **small, api_name="/generate")
    assert Path(video).read_bytes()[4:8] == b"ftyp"
    bob = Client(served.url, auth=("bob", "bob's password"), verbose=False)
    (job,) = bob.predict(api_name="/list_jobs")["jobs"]
    assert job["owner"] == "ann"
    with pytest.raises(Exception, match="only ann or an admin can delete it"):
        bob.predict(job["id"], api_name="/delete_job")
    assert bob.predict(job["id"], api_name="/star_job")["starred"] is True
