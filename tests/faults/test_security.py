"""Harms by callers: guesses, forgeries, floods, paths, marks."""

from __future__ import annotations

import concurrent.futures
import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app import accounts
from mochi_app.store.metadata import read_metadata
from mochi_app.web import auth, throttle
from mochi_app.web.tickets import SECRET_HEADER
from tests.serving import DEADLINE, Refusal, Served

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 2}
TOKEN = "the token of this test's machine"
EVIL = "https://evil.example"
get = functools.partial(httpx.get, timeout=DEADLINE)
post = functools.partial(httpx.post, timeout=DEADLINE)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a login, on which Ann, Bob and Ada, an admin, have accounts."""
    folder = tmp_path_factory.mktemp("closed")
    path = folder / "accounts"
    for name in ("ann", "bob", "ada"):
        accounts.add(path, name, f"{name}'s password", admin=name == "ada")
    served = Served(
        folder / "data",
        program=("-m", "tests.faults.server", "ok"),
        MOCHI_AUTH_FILE=str(path),
        MOCHI_API_TOKEN=TOKEN,
        MOCHI_TRUSTED_PROXIES="127.0.0.1",  # the callers of these cases say where they come from
    )
    served.start().headers = {"authorization": f"Bearer {TOKEN}"}
    yield served.ready()
    served.end()


def enter(served: Served, name: str, address: str = "203.0.113.1") -> httpx.Response:
    """Try to log in with the right password, from this address."""
    return post(
        f"{served.url}/login",
        data={"username": name, "password": f"{name}'s password"},
        headers={"x-forwarded-for": address},
    )


def as_user(served: Served, name: str) -> Served:
    """The same server, called by this user."""
    other = Served(served.data_dir)
    other.url = served.url
    cookies = "; ".join(f"{key}={value}" for key, value in enter(served, name).cookies.items())
    other.headers = {"cookie": cookies}
    return other


def works(served: Served) -> None:
    """A job is made."""
    job = served.call("submit_job", prompt="all is well", **SMALL)
    assert served.ended(job["id"])["status"] == "COMPLETED"


def test_passwords_are_guessed_by_the_dozen(closed: Served) -> None:
    """Passwords are guessed by the dozen from one address: ten are checked, the others are told to
    wait; meanwhile others log in and work."""

    def guess(number: int) -> int:
        form = {"username": "ann", "password": f"guess {number}"}
        headers = {"x-forwarded-for": "198.51.100.7"}
        return post(f"{closed.url}/login", data=form, headers=headers).status_code

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        guesses = threads.map(guess, range(80))
        works(closed)
        assert enter(closed, "bob").status_code == 200
        told = Counter(guesses)
    assert set(told) == {401, 429}
    earned = (time.monotonic() - began) / throttle.SECONDS_A_TRY
    assert told[401] <= throttle.TRIES + earned + 1
    assert enter(closed, "ann", "198.51.100.7").status_code == 429


def test_another_sites_page_posts(closed: Served) -> None:
    """Another site's page posts with its visitor's login: refused, and the page cannot read any
    answer."""
    ann = as_user(closed, "ann")
    before = ann.call("list_jobs")["total"]
    for path in ("call/v2/submit_job", "queue/join", "component_server", "run/submit_job"):
        answer = post(
            f"{closed.url}/gradio_api/{path}",
            content='{"prompt": "not mine", "data": []}',
            headers=ann.headers | {"origin": EVIL, "content-type": "text/plain"},
        )
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    asked = get(f"{closed.url}/config", headers=ann.headers | {"origin": EVIL})
    assert asked.status_code == 403
    assert ann.call("list_jobs")["total"] == before


def test_a_cookie_is_forged(closed: Served) -> None:
    """A login's cookie is forged, or altered to name an admin: it gives no access."""
    name, _, value = as_user(closed, "ann").headers["cookie"].partition("=")
    payload, rest = value.split(".", 1)
    other_key = auth.serializer(b"x" * 32, "login").dumps(["ada", "0" * 16])
    admin = other_key.split(".")[0]
    for forged in (other_key, f"{admin}.{rest}", payload, f"{payload}.{rest}x", "%00", "a" * 4000):
        for path in ("/events", "/config", "/gradio_api/info", "/files/x"):
            answer = get(closed.url + path, headers={"cookie": f"{name}={forged}"})
            assert answer.status_code == 401, (forged, path)
    assert as_user(closed, "ann").get("/config").status_code == 200


def test_a_ticket_is_forged(closed: Served) -> None:
    """A ticket's header is forged to take a turn at a slot: refused, with and without a login."""
    turn = f"{closed.url}/gradio_api/call/engine_turn"
    for secret in (b"", b"guess", "é".encode(), TOKEN.encode()):
        forged = (SECRET_HEADER.encode(), secret)
        answer = post(turn, json={"data": []}, headers=[forged])
        assert answer.status_code == 401
        known = [(name.encode(), value.encode()) for name, value in closed.headers.items()]
        posted = post(turn, json={"data": []}, headers=[*known, forged])
        stream = closed.get(f"/gradio_api/call/engine_turn/{posted.json()['event_id']}").text
        assert "event: error" in stream
        assert "the app's own" in stream
    works(closed)


def test_an_endless_body(closed: Served) -> None:
    """An endless request body is sent: refused after 256 KiB, and none of it is kept."""

    def endless() -> Iterator[bytes]:
        for _ in range(4000):
            yield b"x" * 65536

    before = closed.memory_mib
    for _ in range(4):
        try:
            answer = post(
                f"{closed.url}/gradio_api/call/submit_job",
                content=endless(),
                headers=closed.headers,
            )
            assert answer.status_code == 413
        except httpx.WriteError:
            pass  # the server has hung up while we still wrote
    assert closed.memory_mib - before < 50
    works(closed)


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A web server that must not be asked for anything: its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"root:")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/passwd", asked
    server.shutdown()
    server.server_close()


def test_paths_and_urls_are_slipped_in(closed: Served, canary: tuple[str, list[str]]) -> None:
    """Paths and URLs are slipped into file requests, inputs and proxies: none is opened or
    fetched."""
    url, asked = canary
    videos = closed.data_dir / "videos"
    (closed.data_dir / "outside.mp4").write_bytes(b"root:")
    (videos / "stray.mp4").write_bytes(b"root:")
    (videos / ("0" * 14 + "-" + "0" * 16 + ".mp4")).write_bytes(b"root:")
    targets = [
        "/etc/passwd",
        url,
        f"{videos}/../outside.mp4",
        f"{videos}/..%2foutside.mp4",
        f"{videos}/stray.mp4",
        f"{videos}/00000000000000-0000000000000000.mp4",
        str(closed.data_dir / "secret.key"),
        "app.py",
    ]
    for target in targets:
        for route in (
            "gradio_api/file=",
            "gradio_api/file/",
            "gradio_api/proxy=",
            "static/",
            "files/",
        ):
            answer = get(f"{closed.url}/{route}{target}", headers=closed.headers)
            assert answer.status_code in (400, 403, 404), (route, target)
            assert b"root:" not in answer.content
        file = {"path": target, "url": target, "meta": {"_type": "gradio.FileData"}}
        for body in ({"prompt": file}, {"prompt": [{"deep": file}]}):
            posted = post(
                f"{closed.url}/gradio_api/call/v2/submit_job", json=body, headers=closed.headers
            )
            assert posted.status_code == 422
    assert asked == []
    works(closed)


def test_a_file_is_uploaded(closed: Served, tmp_path: Path) -> None:
    """A file is uploaded: refused on every route, and nothing of it is kept."""
    for path in ("upload", "component_server", "process_recording", "call/submit_job"):
        answer = post(
            f"{closed.url}/gradio_api/{path}",
            files={"files": b"kept by nobody"},
            headers=closed.headers,
        )
        assert answer.status_code in (404, 405, 415)
    assert post(f"{closed.url}/login", files={"files": b"x"}).status_code == 415


def test_a_prompt_carries_markup_and_escapes(closed: Served) -> None:
    """A prompt contains markup, terminal escapes, forged log lines and right-to-left marks: it is
    shown, stored and written into the file unchanged, and never reaches the log unescaped."""
    prompt = (
        "fail <img src=x onerror=alert(1)> **bold** \x1b[2J\x1b]0;owned\x07\r\n"
        "2026-01-01 ERROR forged \u202etxt.exe\u202c $(id) ; # = \\ 'q' \"q\" \x9b31m"
    )
    made = closed.call("submit_job", prompt=prompt.removeprefix("fail "), **SMALL)
    assert made["prompt"] == prompt.removeprefix("fail ")
    assert closed.ended(made["id"])["status"] == "COMPLETED"
    metadata = read_metadata(closed.data_dir / "videos" / f"{made['id']}.mp4")
    assert metadata["prompt"] == prompt.removeprefix("fail ")
    failed = closed.call("submit_job", prompt=prompt, **SMALL)
    assert closed.ended(failed["id"])["status"] == "FAILED"
    named = post(f"{closed.url}/login", data={"username": prompt, "password": "x"})
    assert named.status_code in (401, 429)
    for path, body in (  # what Gradio itself complains of, traceback and all
        ("run/predict", {"data": [prompt], "fn_index": 0}),
        ("call/submit_job", {"data": [prompt]}),
    ):
        url = f"{closed.url}/gradio_api/{path}"
        assert "Traceback" not in post(url, json=body, headers=closed.headers).text
    works(closed)
    log = closed.log.read_bytes().decode("utf-8")
    assert "owned" in log
    assert not set(log) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert "\n2026-01-01 ERROR forged" not in log


def test_a_user_stops_and_deletes_anothers_job(closed: Served) -> None:
    """A user stops, deletes and purges another user's job: refused with the owner's name; the owner
    and admins can."""
    ann, bob, ada = (as_user(closed, name) for name in ("ann", "bob", "ada"))
    job = ann.call("submit_job", prompt="slow", **SMALL | {"num_inference_steps": 400})
    with pytest.raises(Refusal, match="only ann or an admin can cancel it"):
        bob.call("cancel_job", job_id=job["id"])
    assert bob.call("star_job", job_id=job["id"])["starred"] is True
    ann.call("cancel_job", job_id=job["id"])
    assert ann.ended(job["id"])["status"] == "CANCELLED"
    with pytest.raises(Refusal, match="only ann or an admin can delete it"):
        bob.call("delete_job", job_id=job["id"])
    assert ada.call("delete_job", job_id=job["id"])["deleted_at"]


def test_an_account_is_removed(closed: Served) -> None:
    """An account is removed while its owner is logged in: the next request is refused."""
    path = closed.data_dir.parent / "accounts"
    accounts.add(path, "eve", "eve's password", admin=False)
    eve = as_user(closed, "eve")
    assert eve.get("/config").status_code == 200
    accounts.remove(path, "eve")
    assert eve.get("/config").status_code == 401


def test_the_accounts_file_is_damaged(closed: Served) -> None:
    """The accounts file gets a bad line, and loses an account, while people are logged in: /healthz
    is 503 and says so, nobody can log in, the removed person is locked out, the others go on, and
    the file is used again once it is fixed."""
    path = closed.data_dir.parent / "accounts"
    ann, bob = as_user(closed, "ann"), as_user(closed, "bob")
    sound = path.read_text()
    kept = [line for line in sound.splitlines() if not line.startswith("bob:")]
    path.write_text("\n".join([*kept, "zoe:what is this\n"]))
    try:
        health = closed.get("/healthz")
        assert health.status_code == 503
        assert any(reason.startswith("accounts: ") for reason in health.json()["reasons"])
        assert enter(closed, "ada").status_code == 503
        assert bob.get("/config").status_code == 401
        works(ann)
    finally:
        path.write_text(sound)
    assert closed.get("/healthz").status_code == 200
    assert enter(closed, "bob").status_code == 200


def test_another_browser_stops_a_job(serve: Callable[..., Served]) -> None:
    """Without a login, another browser stops or deletes somebody's job: refused, with a hint where
    it is possible."""
    served = serve("ok").ready()
    mine, theirs = (httpx.Client(base_url=served.url, timeout=DEADLINE) for _ in range(2))
    for browser in (mine, theirs):
        browser.get("/").raise_for_status()
    served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in mine.cookies.items())}
    job = served.call("submit_job", prompt="slow", **SMALL | {"num_inference_steps": 400})
    served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in theirs.cookies.items())}
    with pytest.raises(Refusal, match="another browser: cancel it there"):
        served.call("cancel_job", job_id=job["id"])
    served.headers = {}
    with pytest.raises(Refusal, match="another browser: cancel it there"):
        served.call("cancel_job", job_id=job["id"])
    served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in mine.cookies.items())}
    served.call("cancel_job", job_id=job["id"])
    assert served.ended(job["id"])["status"] == "CANCELLED"


def test_a_site_gives_its_own_name_this_address(serve: Callable[..., Served]) -> None:
    """Without a login, a site points its own name at this server's address (DNS rebinding): its
    page reads nothing and submits nothing."""
    served = serve("ok").ready()
    own = {"host": "evil.example:7860", "origin": "http://evil.example:7860"}
    for headers in (own, own | {"x-forwarded-host": "localhost"}):
        for path in ("/", "/config", "/metrics", "/events"):
            assert get(f"{served.url}{path}", headers=headers).status_code == 421
        for path in ("call/v2/submit_job", "queue/join", "run/submit_job"):
            url = f"{served.url}/gradio_api/{path}"
            assert post(url, json={"prompt": "theirs"}, headers=headers).status_code == 421
    assert served.call("list_jobs")["total"] == 0
    works(served)
