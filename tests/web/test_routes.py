"""HEAD is answered as GET is, without a body; no stream is opened for it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mochi_app import accounts
from mochi_app.web import events
from mochi_app.web.page_files import PAGE_FILES
from tests.serving import Served

SMALL = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("head")
    server = Served(folder / "data", program=("-m", "tests.faults.server", "ok"))
    yield server.start().ready()
    server.end()


@pytest.fixture(scope="module")
def job_id(served: Served) -> str:
    job = served.ended(served.call("submit_job", prompt="a ring", **SMALL)["id"])
    return str(job["id"])


PATHS = [
    "/",
    "/livez",
    "/healthz",
    "/metrics",
    "/login",
    "/favicon.ico",
    "/robots.txt",
    "/theme.css",
    "/config",
    "/manifest.json",
    "/gradio_api/info",
    "/gradio_api/app_id",
    "/gradio_api/login_check",
    "/gradio_api/queue/status",
    "/static/img/logo.svg",
    f"/page/{PAGE_FILES.version}/main.js",
    "/page/0/main.js",
    "/files/JOB",
    "/files/JOB?download=true",
    "/files/JOB/poster",
    "/files/none",
    "/files/../secret",
    "/nothing",
]


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_a_body(served: Served, job_id: str, path: str) -> None:
    url = served.url + path.replace("JOB", job_id)
    got, head = httpx.get(url), httpx.head(url)
    assert head.status_code == got.status_code
    assert head.content == b""
    for name in ("content-type", "location", "content-disposition", "etag", "accept-ranges"):
        assert head.headers.get(name) == got.headers.get(name), name
    if path != "/metrics":  # its text changes
        assert head.headers.get("content-length") == got.headers.get("content-length")


def test_a_head_leaves_its_connection_usable(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    for path in ("/healthz", "/", "/favicon.ico", "/events", "/metrics", "/nothing"):
        connection.request("HEAD", path)
        connection.getresponse().read()
    connection.request("GET", "/livez")
    assert connection.getresponse().read() == b"ok\n"


def test_head_takes_no_seat_of_the_live_events(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=10) as client:
        for _ in range(events.STREAMS_OF_ADDRESS + 5):
            head = client.head("/events")
            assert head.status_code == 200
        assert head.headers["content-type"].startswith("text/event-stream")
        assert head.headers["cache-control"] == "no-store"
        with client.stream("GET", "/events") as stream:
            assert stream.status_code == 200
            assert next(stream.iter_lines()).startswith("data: ")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/queue/data?session_hash=x",
        "/gradio_api/heartbeat/x",
        "/gradio_api/call/get_job_status/x",
        "/gradio_api/call/v2/get_job_status/x",
    ],
)
def test_head_opens_no_stream_of_gradios(served: Served, path: str) -> None:
    head = httpx.head(served.url + path, timeout=10)
    assert (head.status_code, head.content) == (405, b"")
    assert head.headers["allow"] == "GET"


def test_an_answer_that_waits_survives_a_head(served: Served, job_id: str) -> None:
    base = f"{served.url}/gradio_api/call"
    posted = httpx.post(f"{base}/v2/get_job_status", json={"job_id": job_id}).json()["event_id"]
    httpx.head(f"{base}/get_job_status/{posted}", timeout=10)
    assert "event: complete" in httpx.get(f"{base}/get_job_status/{posted}", timeout=10).text


def test_head_is_as_closed_as_get(tmp_path: Path) -> None:
    people = tmp_path / "accounts"
    accounts.add(people, "ann", "ann's password", admin=False)
    program = ("-m", "tests.faults.server", "ok")
    closed = Served(tmp_path / "data", program=program, MOCHI_AUTH_FILE=str(people)).start()
    try:
        for path in ("/", "/livez", "/login", "/metrics", "/events", "/favicon.ico", "/config"):
            got = httpx.get(closed.url + path).status_code
            assert httpx.head(closed.url + path).status_code == got, path
        assert httpx.head(f"{closed.url}/metrics").status_code == 401
        assert httpx.head(f"{closed.url}/login").status_code == 200
    finally:
        closed.end()
