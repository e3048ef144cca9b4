"""What is refused before any route sees it: origins, bodies, paths; and what answers carry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from mochi_app.web import middleware
from tests.asgi import Web, asking, echo


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
        ("GET", "/page/0a/main.js", {"origin": "http://gpubox"}, True),
        ("GET", "/page/0a/", {"origin": "http://evil.example"}, False),
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
    guard = middleware.OwnOrigin(echo, ("https://friend.example",), "https://public.example/mochi")
    async with asking(guard) as client:
        answer = await client.request(method, path, headers=headers)
    assert answer.status_code == (200 if passes else 403)


async def test_a_page_behind_a_proxy_without_host_is_told_what_to_pass_on() -> None:
    page = {"origin": "http://gpubox:8882", "host": "127.0.0.1:7860"}
    async with asking(middleware.OwnOrigin(echo)) as client:
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
    async with asking(middleware.OwnOrigin(echo)) as client:
        answer = await client.post("/login", headers=marked)
    assert "<script" not in answer.text


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


async def posted(body: bytes, kind: str, chunked: bool) -> httpx.Response:
    """What an app behind the middleware answers, which repeats what it is sent."""

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), 60_000):
            yield body[begin : begin + 60_000]

    async with asking(middleware.BoundedBody(echo)) as client:
        content: Any = chunks() if chunked else body
        return await client.post("/", content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"x" * (middleware.MAX_BODY_BYTES + 1), "text/plain", 413),
        (b"[" * 100_000, "application/json", 400),
        (json.dumps({"data": [{"deep": [FILE]}]}).encode(), "application/json", 422),
        (json.dumps(FILE).replace("gradio", "\\u0067radio").encode(), "text/plain", 422),
        (b"--x--", "Multipart/Form-Data; boundary=x", 415),
        (b"--x--", " multipart/mixed;boundary=x", 415),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
async def test_what_no_caller_needs_to_send_is_refused(
    body: bytes, kind: str, status: int, chunked: bool
) -> None:
    assert (await posted(body, kind, chunked)).status_code == status


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"x" * middleware.MAX_BODY_BYTES, "text/plain"),
        (b'{"path": "/etc/passwd", "meta": {}}', "application/json"),
        (b"\xff\xfe", "application/json"),  # its route's to refuse
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
async def test_any_other_body_comes_through_whole(body: bytes, kind: str, chunked: bool) -> None:
    answer = await posted(body, kind, chunked)
    assert (answer.status_code, answer.content) == (200, body)


async def test_the_app_reads_no_call_that_refers_to_a_file(web: Web) -> None:
    client = (await web()).client
    calls = ("/gradio_api/call/v2/submit_job", "/gradio_api/call/submit_job", "/api/jobs")
    for path in calls:
        for body in ({"prompt": FILE}, {"data": ["p", {"x": [FILE]}]}):
            answer = await client.post(path, json=body)
            assert (answer.status_code, "refers to a file" in answer.text) == (422, True), path


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
    async with asking(middleware.BoundedBody(echo)) as client:
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
    await middleware.BoundedBody(echo)(scope, receive, send)
    assert (sent[0]["status"], read) == (413, 5)


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.01)
    with pytest.raises(middleware.BadBody, match="did not come") as error:
        await middleware.whole_body(Headers(), asyncio.Event().wait)  # type: ignore[arg-type]
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
    assert not middleware.needed(method, path)


async def test_headers_that_protect_a_browser() -> None:
    guard = middleware.SecurityHeaders(echo, ("https://huggingface.co",))
    async with asking(guard) as client:
        headers = (await client.get("/")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert policy.endswith("frame-ancestors 'self' https://huggingface.co")
    assert "http:" not in policy


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
