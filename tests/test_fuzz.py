"""Whatever is sent: the API answers without a 5xx, and parsers raise only what they document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from starlette.requests import HTTPConnection

from mochi_app import accounts, messages
from mochi_app.accounts import Account, AccountsError, PasswordHash
from mochi_app.codec import ProtocolError
from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameters import GenerationRequest
from mochi_app.request import RequestError
from mochi_app.settings import load_settings
from mochi_app.store.metadata import parse_ffmetadata
from mochi_app.web import auth, middleware
from mochi_app.web import login as forms
from tests.serving import Served

TOKEN = "the token of the fuzzing machine"
EXAMPLES = 15  # per operation of the API: 19 of them, two servers, less than a minute


def serve(folder: Path, **more: str) -> Iterator[Served]:
    """A server with a faked model."""
    served = Served(folder / "data", program=("-m", "tests.faults.server", "ok"), **more)
    yield served.start()
    served.end()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without a login."""
    yield from serve(tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with one, called by a machine that holds its token."""
    folder = tmp_path_factory.mktemp("closed")
    accounts.add(folder / "accounts", "ann", "ann's password", admin=False)
    for served in serve(folder, MOCHI_AUTH_FILE=str(folder / "accounts"), MOCHI_API_TOKEN=TOKEN):
        served.headers = {"authorization": f"Bearer {TOKEN}"}
        yield served


bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def fuzz(served: Served) -> set[str]:
    """Send every operation of the API what its schema allows, and what it does not; their paths."""
    import schemathesis  # seconds, which the tests of the parsers need not wait for
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.result import Ok

    url = f"{served.url}/gradio_api/openapi.json"
    schema = schemathesis.openapi.from_url(url, headers=served.headers)
    paths = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), f"the schema tells of what is none: {found}"
        operation = found.ok()
        paths.add(operation.path)
        for mode in GenerationMode:

            @bounded
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case[Any]) -> None:
                case.call_and_validate(
                    checks=[not_a_server_error], headers=served.headers, timeout=10
                )

            with contextlib.suppress(Unsatisfiable):  # a path of text alone cannot be wrong
                send()
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("door", ["opened", "closed"])
def test_no_call_makes_a_server_error(door: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(door)
    paths = fuzz(served)
    assert len(paths) == 23
    assert served.get("/livez").text == "ok\n"
    assert "Traceback" not in served.log.read_text()


# Parsers

quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def types_of_messages() -> list[str]:
    return sorted(messages._TYPES)


@quick
@given(line=st.binary() | anything.map(lambda value: json.dumps(value).encode()))
def test_a_line_of_the_channel_is_a_message_or_a_protocol_error(line: bytes) -> None:
    try:
        message = messages.decode(line)
    except ProtocolError:
        return
    assert json.loads(messages.encode(message)) == json.loads(line)


@quick
@given(kind=st.sampled_from(types_of_messages()), fields=st.dictionaries(st.text(), anything))
def test_a_message_with_other_fields_is_a_protocol_error(kind: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(ProtocolError):
        messages.decode(json.dumps({"type": kind} | fields).encode())


@quick
@given(text=st.text(alphabet=st.sampled_from("a=;#\\[]\n\r\0é ") | st.characters()))
def test_any_text_has_tags_or_none(text: str) -> None:
    tags = parse_ffmetadata(text)
    assert all(isinstance(part, str) for pair in tags.items() for part in pair)


DEFAULTS = ModelDefaults(
    height=64, width=64, num_frames=7, fps=12, guidance_scale=3,
    max_height=128, max_width=128, max_num_frames=31,
)  # fmt: skip
FIELDS = (
    "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "height", "width",
    "num_frames", "schedule", "lora", "lora_scale", "request_id",
)  # fmt: skip


@quick
@given(prompt=anything, others=st.dictionaries(st.sampled_from(FIELDS), anything))
def test_a_request_is_valid_or_refused(prompt: Any, others: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        asked = GenerationRequest.validate(DEFAULTS, prompt=prompt, **others)
        assert 1 <= len(asked.prompt) <= 2000
        assert 0 <= asked.seed < 2**32


HASH = str(PasswordHash(2, 1, 1, b"12345678", bytes(32)))
words = st.sampled_from(["ann", "anon-x", "api", "admin", ":", "$", "#", "\n", "scrypt", "2", HASH])


@quick
@given(text=st.text() | st.lists(words).map("".join))
def test_an_accounts_file_is_read_or_refused(text: str) -> None:
    told = ""
    try:
        found = accounts.parse_accounts(text)
        assert accounts.parse_accounts("\n".join(map(str, found.values()))) == found
    except AccountsError as error:
        told = str(error)
    assert HASH.rsplit("$", 1)[1] not in told


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> auth.Auth:
    folder = tmp_path_factory.mktemp("door")
    (folder / "accounts").write_text(f"{Account('ann', PasswordHash.parse(HASH))}\n")
    chosen = load_settings(data_dir=folder, auth_file=folder / "accounts", api_token=TOKEN)
    return auth.Auth(chosen, "ticket")


@quick
@given(
    payload=st.binary() | anything.map(lambda value: json.dumps(value).encode()),
    header=st.sampled_from(["cookie", "authorization", "x-mochi-ticket"]),
    signed=st.booleans(),
)
def test_no_header_comes_in_or_raises(
    door: auth.Auth, payload: bytes, header: str, signed: bool
) -> None:
    value = payload
    if signed:  # by our own key, which vouches for no content
        value = door._logins.make_signer(door._logins.salt).sign(payload)
    raw = f"{door.login_cookie}=".encode() * (header == "cookie") + value
    path = "/gradio_api/call/engine_turn"
    scope = {"type": "http", "path": path, "headers": [(header.encode(), raw)]}
    assert door.caller(HTTPConnection(scope)) is None


@quick
@given(body=st.binary())
def test_any_body_is_a_form_or_none(body: bytes) -> None:
    assert all(len(text) <= accounts.MAX_PASSWORD + 1 for text in forms.parse_form(body).values())


@quick
@given(body=st.binary() | anything.map(lambda value: json.dumps(value).encode()))
def test_a_body_that_refers_to_no_file_passes(body: bytes) -> None:
    middleware.check_json(body)


@quick
@given(
    inside=st.dictionaries(st.text(), anything, max_size=3),
    wraps=st.lists(st.text() | st.integers(0, 3), max_size=20),
)
def test_a_reference_to_a_file_is_found_wherever_it_lies(
    inside: dict[str, Any], wraps: list[str | int]
) -> None:
    value: Any = inside | {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for wrap in wraps:
        value = {"": None, wrap: value} if isinstance(wrap, str) else [*range(wrap), value, "x"]
    with pytest.raises(middleware.BadBody, match="refers to a file"):
        middleware.check_json(json.dumps(value).encode())


@quick
@given(url=st.text() | st.text().map("http://{}".format))
def test_any_origin_is_a_place_or_none(url: str) -> None:
    found = middleware.place(url)
    assert found is None or isinstance(found[1], int)
