"""The messages: what is said comes back as it was said, and nothing else is taken for a message."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pytest

from mochi_app import messages
from mochi_app.messages import Cancel, Message, ProtocolError, Shutdown, Step, decode, encode

KINDS = sorted(messages._TYPES.items())
SAMPLES: dict[str, Any] = {
    "int": 7,
    "float": 0.5,
    "str": 'text, "quoted"\nover lines 火',
    "bool": True,
    "str | None": "a name",
    "int | None": 7,
    "float | None": 0.5,
    "Mapping[str, Any]": {"prompt": "p", "nested": {"a": [1, None]}},
    "Mapping[str, str]": {"torch": "2"},
    "Mapping[str, float]": {"denoise": 0.5},
}


def filled(kind: type[Message]) -> Message:
    """A message whose fields all have a value, and none its default."""
    return kind(**{item.name: SAMPLES[str(item.type)] for item in fields(kind)})


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_message_comes_back_as_it_was_sent(name: str, kind: type[Message]) -> None:
    message = filled(kind)
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    back = decode(line)
    assert type(back) is kind
    assert back == message
    assert json.loads(line) == {"type": name} | asdict(message)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_no_field_of_a_message_may_be_missing(name: str, kind: type[Message]) -> None:
    record = {"type": name} | asdict(filled(kind))
    for item in fields(kind):
        line = json.dumps({key: record[key] for key in record if key != item.name}).encode()
        with pytest.raises(ProtocolError, match=f"{name} without .*{item.name}"):
            decode(line)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"type": null}',
        b'{"type": "Message", "epoch": 0}',
        b'{"type": "JobEvent", "epoch": 0, "job_id": "j"}',
        b'{"type": "shutdown", "epoch": 0}',
        b'{"type": "Shutdown", "epoch": 0, "now": true}',
        b'{"type": "Cancel", "epoch": 0}',
        b'{"type": ["Shutdown"], "epoch": 0}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_message_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


def test_messages_of_one_shape_are_told_apart_by_their_type() -> None:
    said = [Cancel(job_id="j"), messages.Cancelled(job_id="j"), messages.Followed(job_id="j")]
    assert [type(decode(encode(message))) for message in said] == [type(item) for item in said]
    assert decode(encode(Shutdown(epoch=3))) == Shutdown(epoch=3)
    assert decode(encode(Step(job_id="j", step=1, steps=2, seconds=0.5))) != Shutdown()
