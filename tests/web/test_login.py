"""The form of a login, as it may come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError
from hypothesis import given, settings
from hypothesis import strategies as st

from mochi_app.accounts import Account
from mochi_app.web import auth
from mochi_app.web import login as forms
from mochi_app.web.middleware import BoundedBody
from mochi_app.web.throttle import Throttle
from tests.asgi import Web
from tests.people import cheap
from tests.serving import Served

MULTIPART = "multipart/form-data; boundary=x"


def asked() -> TestClient:
    """An app that answers with the form it was sent."""
    app = FastAPI()
    app.add_middleware(BoundedBody)

    @app.post("/login")
    async def log_in(request: Request) -> object:
        try:
            return await forms.read_form(request)
        except auth.LoginRefused as refused:
            return JSONResponse({"detail": str(refused)}, refused.status)

    return TestClient(app, raise_server_exceptions=True)


CLIENT = asked()


def part(name: str, value: str, more: str = "") -> str:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


GOOD = part("username", "ann") + part("password", "pässword =&+%") + "--x--\r\n"


def send(body: str | bytes, kind: str) -> tuple[int, dict[str, str]]:
    content = body.encode() if isinstance(body, str) else body
    answer = CLIENT.post("/login", content=content, headers={"content-type": kind})
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (GOOD, MULTIPART),
        (GOOD, 'Multipart/FORM-DATA; charset=utf-8; boundary="x"'),
        (GOOD + "an epilogue", MULTIPART),
        (part("username", "ann") + part("username", "bob") + GOOD, MULTIPART),
        (
            "username=ann&password=p%C3%A4ssword+%3D%26%2B%25",
            "application/x-www-form-urlencoded; charset=UTF-8",
        ),
        (
            "username=ann&password=p%C3%A4ssword+%3D%26%2B%25&username=bob",
            "APPLICATION/X-WWW-FORM-URLENCODED",
        ),
    ],
)
def test_name_and_password_are_read(body: str, kind: str) -> None:
    assert send(body, kind) == (200, {"username": "ann", "password": "pässword =&+%"})


@pytest.mark.parametrize(
    ("body", "kind", "status", "told"),
    [
        (GOOD, "multipart/form-data", 400, "cannot be read as multipart/form-data: Missing bound"),
        (GOOD, "multipart/form-data; boundary=" + "y" * 300, 400, "cannot be read as multipart"),
        ("nonsense", MULTIPART, 400, "cannot be read as multipart"),
        ("", MULTIPART, 400, "no field username and no field password"),
        (GOOD[:-12], MULTIPART, 400, "no field password"),
        (part("username", "ann") + "--x--\r\n", MULTIPART, 400, "no field password"),
        ("--x\r\nContent-Type: text/plain\r\n\r\nann\r\n--x--", MULTIPART, 400, "name"),
        (part("n", "v") * 9 + GOOD, MULTIPART, 400, "Too many fields"),
        (part("username", "a" * 9000) + GOOD, MULTIPART, 400, "exceeded maximum size of 8KB"),
        (part("photo", "x", '; filename="a.png"') + GOOD, MULTIPART, 415, "'photo' is a file"),
        (part("f", "x", '; filename="a"') * 9 + GOOD, MULTIPART, 400, "Too many files"),
        (GOOD, MULTIPART + "; charset=undefined", 400, "expected text in UTF-8"),
        ("x" * (257 << 10), MULTIPART, 413, "too long"),
    ],
)
def test_a_malformed_form_is_refused_in_words(body: str, kind: str, status: int, told: str) -> None:
    answered, detail = send(body, kind)
    assert (answered, told in detail["detail"]) == (status, True), detail


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [b"--x", b"--x--", b"\r\n", b"\r", b"Content-Disposition: form-data; ", b"name=",
                 b'name="username"', b'name="password"', b"; filename*=utf-8''%ff", b":", b"\x00",
                 b"Content-Transfer-Encoding: base64\r\n", b'"', b"=?utf-8?q?x?="]
            ),
            st.binary(max_size=8),
        ),
        max_size=20,
    ),
    st.sampled_from(
        [MULTIPART, MULTIPART + "; charset=zip", MULTIPART + "; charset=punycode",
         "multipart/form-data; =;x", "multipart/form-data; boundary=; charset=hex",
         'multipart/form-data; boundary="', "multipart/form-data; boundary*=utf-8''x",
         "multipart/form-data; boundary=\xe9"]
    ),
)  # fmt: skip
def test_no_bytes_are_a_crash(pieces: list[bytes], kind: str) -> None:
    headers = {b"content-type": kind.encode("latin-1")}
    answer = CLIENT.post("/login", content=b"".join(pieces), headers=headers)
    assert answer.status_code in (200, 400, 415)


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


# A real server, for Gradio's client
@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("login")
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
