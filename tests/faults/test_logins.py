"""Harms by logins: their streams go on, their cookies are copied, the clock is wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app import accounts
from tests.serving import DEADLINE, Served, poll

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 7}
SLOW = SMALL | {"prompt": "slowest", "num_inference_steps": 400}
ENDS_SECONDS = 20.0  # a stream has ended so long after its login
HOUR, DAY = 3600, 86400


class Listener:
    """Reads a stream to its end, however that comes."""

    def __init__(self, browser: httpx.Client, path: str) -> None:
        self.status = 0
        self.bytes = 0
        self.ended = False
        self._browser, self._path = browser, path
        threading.Thread(target=self._read, daemon=True).start()
        poll(lambda: self.bytes or self.ended, f"the beginning of {path}")

    @property
    def reads(self) -> bool:
        """Whether the stream was opened and goes on."""
        return self.status == 200 and not self.ended

    def _read(self) -> None:
        try:
            with self._browser.stream("GET", self._path) as answer:
                self.status = answer.status_code
                for piece in answer.iter_raw():
                    self.bytes += len(piece)
        except httpx.HTTPError:
            pass
        self.ended = True


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """An accounts file with Ann and Bob."""
    path = tmp_path / "accounts"
    for name in ("ann", "bob"):
        accounts.add(path, name, f"{name}'s password", admin=False)
    return path


def browser_of(served: Served, name: str = "") -> httpx.Client:
    """A browser, logged in if there is a name."""
    browser = httpx.Client(base_url=served.url, timeout=DEADLINE)
    if name:
        form = {"username": name, "password": f"{name}'s password"}
        browser.post("/login", data=form).raise_for_status()
    return browser


def copy_of(browser: httpx.Client) -> httpx.Client:
    """Another browser with the same cookies."""
    return httpx.Client(base_url=browser.base_url, timeout=DEADLINE, cookies=dict(browser.cookies))


def status(browser: httpx.Client) -> int:
    """How a page that asks for a login answers."""
    return browser.get("/config").status_code


def streams(browser: httpx.Client) -> list[Listener]:
    """Every kind of stream that has no end of its own, each of them begun."""
    config = browser.get("/config").json()
    generate = next(fn for fn in config["dependencies"] if fn["api_name"] == "generate")
    called = browser.post("/gradio_api/call/v2/generate", json=SLOW).json()["event_id"]
    joined = {"data": ["slowest", *[None] * 12], "fn_index": generate["id"], "session_hash": "page"}
    browser.post("/gradio_api/queue/join", json=joined).raise_for_status()
    paths = (
        "/events",
        f"/gradio_api/call/generate/{called}",
        "/gradio_api/queue/data?session_hash=page",
        "/gradio_api/heartbeat/page",
    )
    listeners = [Listener(browser, path) for path in paths]
    assert all(listener.reads for listener in listeners)
    return listeners


@contextmanager
def only_these_end(ending: list[Listener], others: list[Listener]) -> Iterator[None]:
    """Within this, something ends the logins of `ending`; the streams of `others` go on."""
    yield
    poll(lambda: all(each.ended for each in ending), "the end of the streams", ENDS_SECONDS)
    seen = [each.bytes for each in others]
    events = others[0]
    poll(lambda: events.bytes > seen[0], "more of the other streams")
    assert all(each.reads for each in others)


@pytest.mark.parametrize("how", ["removed", "changed"])
def test_an_account_ends_while_its_streams_are_open(
    serve: Callable[..., Served], team: Path, how: str
) -> None:
    """An account is removed, or its password changed, while its page and calls have open streams:
    these streams end within 20 s, while its jobs and other people's streams go on."""
    served = serve("ok", MOCHI_AUTH_FILE=str(team)).ready()
    ann, bob = browser_of(served, "ann"), browser_of(served, "bob")
    others = streams(bob)
    with only_these_end(streams(ann), others):
        if how == "removed":
            accounts.remove(team, "ann")
        else:
            accounts.add(team, "ann", "another password", admin=False)
    assert status(ann) == 401
    served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in bob.cookies.items())}
    jobs = served.call("list_jobs")["jobs"]
    assert {job["status"] for job in jobs} <= {"PENDING", "PROCESSING"}
    assert [job["owner"] for job in jobs].count("ann") == 2


def test_a_cookie_is_copied_before_its_logout(serve: Callable[..., Served], team: Path) -> None:
    """A login's cookie is copied, and its owner logs out: the copy gives no access, even after a
    restart, and its streams end within 20 s; the same person's other browsers stay logged in."""
    served = serve("ok", MOCHI_AUTH_FILE=str(team)).ready()
    here, there = browser_of(served, "ann"), browser_of(served, "ann")
    copy = copy_of(here)
    with only_these_end(streams(copy), streams(there)):
        assert here.post("/logout").status_code == 303
        assert status(copy) == 401
    assert status(there) == 200
    served.kill()
    served.start()
    assert (status(copy), status(there)) == (401, 200)
    assert status(browser_of(served, "ann")) == 200


def test_the_clock_is_wrong_for_a_login(
    serve: Callable[..., Served], team: Path, tmp_path: Path
) -> None:
    """The clock is set back or forward by hours: logins stay valid; once a login is a month old, it
    and its streams end."""
    clock = tmp_path / "clock"
    served = serve("ok", MOCHI_AUTH_FILE=str(team), FAULTS_CLOCK=str(clock)).ready()
    ann = browser_of(served, "ann")
    for seconds in (-3, -5 * HOUR, -10 * DAY, 5 * HOUR, 29 * DAY):
        clock.write_text(str(seconds))
        assert status(ann) == 200, seconds
    open_ones = streams(ann)
    clock.write_text(str(31 * DAY))
    poll(lambda: all(each.ended for each in open_ones), "the end of the streams", ENDS_SECONDS)
    assert status(ann) == 401
    clock.write_text("0")
    assert status(ann) == 200


@pytest.mark.parametrize("seconds", [-3, -5 * HOUR, -900 * DAY, 900 * DAY])
def test_the_clock_is_wrong_for_a_browser(
    serve: Callable[..., Served], tmp_path: Path, seconds: int
) -> None:
    """The clock is set back by 3 s, by years, or forward, without a login: a browser keeps its
    identity and its jobs, whatever pages it opens during and after that."""
    clock = tmp_path / "clock"
    served = serve("ok", FAULTS_CLOCK=str(clock)).ready()
    browser = browser_of(served)

    def as_browser(name: str, **parameters: Any) -> Any:
        browser.get("/").raise_for_status()  # which renews its cookie
        served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in browser.cookies.items())}
        return served.call(name, **parameters)

    owner = as_browser("submit_job", **SLOW)["owner"]
    assert owner.startswith("anon-")
    clock.write_text(str(seconds))
    job = as_browser("submit_job", **SLOW)
    assert job["owner"] == owner
    clock.write_text("0")
    as_browser("cancel_job", job_id=job["id"])
    assert served.ended(job["id"])["status"] == "CANCELLED"


def test_a_download_outlasts_its_login(serve: Callable[..., Served], team: Path) -> None:
    """A slow download is under way when its login ends: it is cut off within 20 s, and the client
    does not take it for the whole file."""
    served = serve("ok", MOCHI_AUTH_FILE=str(team)).ready()
    ann = browser_of(served, "ann")
    served.headers = {"cookie": "; ".join(f"{k}={v}" for k, v in ann.cookies.items())}
    job = served.call("submit_job", prompt="a ring", **SMALL | {"num_inference_steps": 2})
    assert served.ended(job["id"])["status"] == "COMPLETED"
    os.truncate(served.data_dir / "videos" / f"{job['id']}.mp4", 1 << 30)
    with ann.stream("GET", f"/files/{job['id']}") as answer:
        assert answer.headers["content-length"] == str(1 << 30)
        pieces = answer.iter_raw(1 << 16)
        assert next(pieces)
        copy_of(ann).post("/logout")
        cut = f"/files/{job['id']} is cut off"
        poll(lambda: cut in served.log.read_text(), "the cut", ENDS_SECONDS)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
