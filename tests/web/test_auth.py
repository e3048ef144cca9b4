"""Who comes in and what is whose: accounts, cookies, tokens, tickets, origins, sizes, owners."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from mochi_app.accounts import Account, Accounts
from mochi_app.callers import Caller
from mochi_app.settings import Settings, SettingsError, load_settings
from mochi_app.studio.studio import Studio
from mochi_app.web import auth
from mochi_app.web.auth import Auth
from mochi_app.web.tickets import SECRET_HEADER
from tests.asgi import Web, asking, call
from tests.conftest import eventually
from tests.people import BEARER, TOKEN, cheap

MakeStudio = Callable[..., Awaitable[Studio]]


# Cookies, tokens, tickets
def test_the_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    key = auth.load_key(tmp_path)
    path = tmp_path / "secret.key"
    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    path.chmod(0o644)
    assert auth.load_key(tmp_path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(SettingsError, match="got 5 bytes, expected 32"):
        auth.load_key(tmp_path)


def settings_in(folder: Path, **overrides: Any) -> Settings:
    folder.mkdir(exist_ok=True)
    return load_settings(data_dir=folder, **overrides)


def coming(path: str = "/events", **headers: str) -> HTTPConnection:
    """A request with these headers."""
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return HTTPConnection({"type": "http", "path": path, "headers": raw})


def cookie_of(door: Auth, account: Account) -> str:
    """What a browser sends after this login."""
    response = PlainTextResponse()
    door.remember(response, coming(), account)
    return response.headers["set-cookie"].split(";")[0]


def test_a_login_lasts_until_password_or_account_change(tmp_path: Path, auth_file: Path) -> None:
    door = Auth(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
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
    door = Auth(settings, "ticket")
    known = Accounts(auth_file)
    ann, ada = known.find("ann"), known.find("ada")
    assert ann is not None
    assert ada is not None
    here, there, other = (cookie_of(door, account) for account in (ann, ann, ada))
    for _ in range(2):
        await door.log_out(coming(cookie=here))
    await door.log_out(coming(cookie=f"{door.login_cookie}=forged"))
    await door.log_out(coming())
    for asked in (door, Auth(settings, "after a restart")):
        assert asked.caller(coming(cookie=here)) is None
        assert asked.caller(coming(cookie=there)) == Caller("ann")
        assert asked.caller(coming(cookie=other)) == Caller("ada", admin=True)
        assert asked.caller(coming(cookie=cookie_of(asked, ann))) == Caller("ann")


async def test_a_logout_counts_whatever_the_clock_says(
    tmp_path: Path, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    door = Auth(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
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
    door = Auth(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
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
    door = Auth(settings_in(tmp_path / "data"), "ticket")
    cookie = door.welcome(coming()).split(";")[0]
    caller = door.caller(coming(cookie=cookie))
    began = now
    for days in (-3 / 86400, -5000, 5000, 0):
        now = began + days * 86400
        assert door.caller(coming(cookie=cookie)) == caller, days
        cookie = door.welcome(coming(cookie=cookie)).split(";")[0]


def test_no_other_cookie_logs_in(tmp_path: Path, auth_file: Path) -> None:
    door = Auth(settings_in(tmp_path / "data", auth_file=auth_file), "ticket")
    other = Auth(settings_in(tmp_path / "other", auth_file=auth_file), "ticket")
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
    door = Auth(settings_in(tmp_path / "data"), "ticket")
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
    door = Auth(settings, "ticket")
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
