"""The form of a login, as it may come."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from mochi_app.web import auth
from mochi_app.web import login as forms
from mochi_app.web.middleware import BoundedBody

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
