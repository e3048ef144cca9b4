"""Under which names a server without a login answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from mochi_app import accounts
from mochi_app.settings import SettingsError, load_settings
from mochi_app.web import hosts
from mochi_app.web.hosts import OwnHost, ServedHosts, UnderPrefix, host_name
from tests.asgi import Web, asking, echo
from tests.serving import Served

EVIL = "evil.example:7860"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:7860", "localhost"),
        ("gpu_box-1.lan.:80", "gpu_box-1.lan"),
        ("127.0.0.1:7860", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[FE80::1]:7860", "fe80::1"),
        ("gpubox:", "gpubox"),
        ("", None),
        (":7860", None),
        (".", None),
        ("gpubox..", None),
        ("gpubox:port", None),
        ("gpubox:123456", None),
        ("::1", None),
        ("[::1", None),
        ("[::1]x", None),
        ("[localhost]", None),
        ("[127.0.0.1]", None),
        ("localhost,evil.example", None),
        ("localhost evil.example", None),
        ("user@localhost", None),
        ("localhost/evil.example", None),
        ("localhost#evil", None),
        ("локалхост", None),
        ("a" * 300, None),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str | None) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize(
    ("header", "served"),
    [
        ("localhost:7860", True),
        ("LOCALHOST.", True),
        ("127.0.0.1", True),
        ("192.168.7.9:80", True),
        ("[::1]:7860", True),
        ("[2001:db8::7]", True),
        ("gpubox:7860", True),
        ("gpubox.local", True),
        ("GpuBox.Lan:7860", True),
        ("gpu.box.internal.", True),
        ("machine.corp.example", True),
        ("full.machine.corp.example", True),
        ("team-mochi.hf.space", True),
        ("mochi.own.example", True),
        ("public.example", True),
        ("PUBLIC.example.:8443", True),
        ("set.example", True),
        ("a.many.example", True),
        ("a.b.many.example", True),
        ("many.example", False),
        ("evil.example:7860", False),
        ("evil.example.", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("1.2.3.4.5", False),
        ("evillocal", True),  # one label is nobody's domain
        ("evil.notlocal", False),
        ("lan.evil.example", False),
        ("xset.example", False),
        ("x.set.example", False),
        ("", False),
        ("localhost,evil.example", False),
    ],
)
async def test_hosts_that_are_served(
    header: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Machine.corp.example")
    monkeypatch.setattr(socket, "getfqdn", lambda: "full.machine.corp.example")
    hosts_of_it = ServedHosts(
        allowed=load_settings(allowed_hosts="set.example, *.many.example").allowed_hosts,
        public_host="Public.example",
        space_host="team-mochi.hf.space, mochi.own.example",
    )
    assert await hosts_of_it.serve(header) is served


async def test_a_star_serves_any_host_that_is_one() -> None:
    any_host = ServedHosts(allowed=("*",))
    assert await any_host.serve(EVIL)
    assert not await any_host.serve("a b")


@pytest.mark.parametrize(
    "value", ["a b c.example", "A.example.,b.example", "", "*", "[::1] 10.0.0.1"]
)
def test_hosts_that_may_be_allowed(value: str) -> None:
    expected = tuple(value.lower().replace(".,", ",").replace(",", " ").split())
    assert load_settings(allowed_hosts=value).allowed_hosts == expected


@pytest.mark.parametrize(
    "value",
    [
        "https://a.example",
        "a.example:7860",
        "a.example/x",
        "*.",
        "a.*.example",
        "**",
        "é.example",
        "a..b",
    ],
)
def test_a_bad_name_stops_the_start(value: str) -> None:
    with pytest.raises(SettingsError, match=r"MOCHI_ALLOWED_HOSTS=.*expected host names such as"):
        load_settings(allowed_hosts=value)


Headers = list[tuple[str, str]]


@pytest.mark.parametrize(
    ("trusted", "headers", "served"),
    [
        ("", [("host", "localhost")], True),
        ("", [("host", EVIL)], False),
        ("", [("host", EVIL), ("x-forwarded-host", "localhost")], False),
        ("10.0.0.1", [("host", EVIL), ("x-forwarded-host", "localhost")], False),
        ("", [("host", "localhost"), ("x-forwarded-host", EVIL)], True),
        ("10.0.0.1", [("host", "localhost"), ("x-forwarded-host", EVIL)], True),
        ("127.0.0.1", [("host", "localhost"), ("x-forwarded-host", EVIL)], False),
        ("127.0.0.0/8", [("host", "localhost"), ("x-forwarded-host", f"a.lan, {EVIL}")], False),
        ("*", [("host", "localhost"), ("x-forwarded-host", EVIL)], False),
        ("127.0.0.1", [("host", "localhost"), ("x-forwarded-host", "studio.lan")], True),
        ("127.0.0.1", [("host", EVIL), ("x-forwarded-host", "localhost")], False),
        ("", [("host", "localhost"), ("host", EVIL)], False),
        ("", [("host", "localhost"), ("host", "localhost")], False),
        ("", [], False),
    ],
)
async def test_every_host_that_a_request_names_must_be_served(
    trusted: str, headers: Headers, served: bool
) -> None:
    guard = OwnHost(echo, ServedHosts(), trusted_proxies=trusted)
    status = 0

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": raw,
             "query_string": b"", "client": ("127.0.0.1", 1)}  # fmt: skip
    await guard(scope, receive, send)
    assert status == (200 if served else 421)


async def test_a_browser_gets_a_page_and_a_program_json() -> None:
    async with asking(OwnHost(echo, ServedHosts()), f"http://{EVIL}") as client:
        page = await client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
        program = await client.post("/gradio_api/call/submit_job")
        probe = await client.get("/livez")
        odd = await client.get("/", headers={"host": "<script>.x", "accept": "text/html"})
    assert (page.status_code, program.status_code, probe.status_code) == (421, 421, 200)
    assert page.headers["content-type"].startswith("text/html")
    for told in (page.text, program.json()["detail"]):
        assert "MOCHI_ALLOWED_HOSTS=evil.example" in told
    assert "<script" not in odd.text


async def test_a_rebound_name_reaches_nothing_and_tickets_still_run(web: Web) -> None:
    running = await web()
    own = {"origin": f"http://{EVIL}"}
    async with asking(running.app, f"http://{EVIL}") as rebound:
        for method, path in (
            ("GET", "/"),
            ("GET", "/metrics"),
            ("GET", "/events"),
            ("GET", "/assets/x.js"),
            ("POST", "/gradio_api/call/submit_job"),
            ("POST", "/gradio_api/queue/join"),
            ("GET", "/login"),
            ("GET", "/livez/"),
        ):
            answer = await rebound.request(method, path, headers=own)
            assert answer.status_code == 421, (method, path)
            assert "set-cookie" not in answer.headers
            assert "content-security-policy" in answer.headers
        assert (await rebound.get("/livez")).status_code == 200
        health = await rebound.get("/healthz")
        assert health.status_code in (200, 503)
        assert all(set(slot) == {"slot", "state"} for slot in health.json()["slots"])
    assert "pids" in (await running.client.get("/healthz")).json()["slots"][0]


async def test_with_a_login_any_host_is_served(web: Web, tmp_path: Path) -> None:
    people = tmp_path / "accounts"
    accounts.add(people, "ann", "ann's password", admin=False)
    running = await web(auth_file=people)
    async with asking(running.app, f"http://{EVIL}") as client:
        assert (await client.get("/login")).status_code == 200
        assert (await client.get("/metrics")).status_code == 401


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server that a Space's name and a setting of ours name."""
    server = Served(
        tmp_path_factory.mktemp("hosts") / "data",
        program=("-m", "tests.faults.server", "ok"),
        MOCHI_ALLOWED_HOSTS="studio.example",
        SPACE_HOST="team.hf.space,own.example",
        GRADIO_ROOT_PATH="https://public.example/mochi",
    )
    yield server.start()
    server.end()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("[::1]:7860", 200),
        ("studio.example", 200),
        ("OWN.example.", 200),
        ("public.example:443", 200),
        (socket.gethostname(), 200),
        (EVIL, 421),
        ("public.example.evil.example", 421),
    ],
)
def test_the_real_server_looks_at_its_host(served: Served, host: str, status: int) -> None:
    asked = {"host": host, "origin": f"http://{host}"}
    for path in ("/metrics", "/config", "/"):
        assert httpx.get(f"{served.url}{path}", headers=asked).status_code == status
    posted = httpx.post(
        f"{served.url}/gradio_api/call/v2/get_job_status", json={"job_id": "x"}, headers=asked
    )
    assert posted.status_code == status


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/events"),
        ("GET", "/metrics"),
        ("GET", "/gradio_api/info"),
        ("POST", "/login"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/submit_job"),
        ("POST", "/gradio_api/call/v2/submit_job"),
        ("DELETE", "/livez"),
    ],
)
def test_another_name_on_the_same_port_is_another_site(
    served: Served, method: str, path: str
) -> None:
    asked = {"host": "gpubox", "origin": "http://evil:8882"}
    assert httpx.request(method, f"{served.url}{path}", headers=asked).status_code == 403


@pytest.mark.parametrize("value", ["mochi", "ftp://a.example", "https://", "/a b", "//a", "/a?b"])
def test_a_bad_root_path_stops_the_start(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", value)
    with pytest.raises(SettingsError, match="GRADIO_ROOT_PATH="):
        hosts.root_path()


@pytest.mark.parametrize(
    ("value", "path", "host"),
    [
        ("", "", None),
        ("/", "", None),
        ("/mochi", "/mochi", None),
        ("/a/mochi/", "/a/mochi", None),
        ("https://public.example:8443/mochi/", "/mochi", "public.example"),
        ("http://public.example", "", "public.example"),
    ],
)
def test_a_root_path_is_a_path_or_an_address(
    value: str, path: str, host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", value)
    root = hosts.root_path()
    assert (root.path, root.host) == (path, host)


@pytest.mark.parametrize(
    ("asked", "heard"),
    [
        ("/mochi/events", "/events"),
        ("/mochi/", "/"),
        ("/events", "/events"),
        ("/mochix/events", "/mochix/events"),
        ("/", "/"),
    ],
)
async def test_a_prefix_that_the_proxy_passes_on_is_taken_off(asked: str, heard: str) -> None:
    async def tell(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse(scope["path"])(scope, receive, send)

    async with asking(UnderPrefix(tell, "/mochi")) as client:
        assert (await client.get(asked)).text == heard


async def test_the_prefix_alone_leads_to_the_page() -> None:
    async with asking(UnderPrefix(echo, "/team/mochi")) as client:
        sent_on = await client.get("/team/mochi?job=1")
    assert sent_on.headers["location"] == "mochi/?job=1"
