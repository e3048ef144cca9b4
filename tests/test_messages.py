"""Messages between a slot and its ranks: each survives its line, and nothing else is one."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from mochi_app import messages
from mochi_app.codec import ProtocolError
from mochi_app.messages import (
    Cancel,
    Cancelled,
    Configure,
    Done,
    Failed,
    Followed,
    Heartbeat,
    Latent,
    Loading,
    Message,
    Ready,
    Resumed,
    Run,
    Shutdown,
    Stage,
    Step,
    Tiles,
    decode,
    encode,
)

STEP = Step(job_id="j", step=1, steps=8, seconds=0.25)
DONE = Done(
    job_id="j", video="v", poster="p", seconds={"text": 1.0}, latents_hash="a", frames_hash=""
)
ALL = (
    Configure(
        epoch=1, slot=0, rank=1, world_size=2, model="/m", device="cpu", dtype="auto", scratch="/s"
    ),
    Run(
        epoch=2, job_id="j", prompt="é\n\ud800", negative_prompt="", seed=2**32 - 1,
        num_inference_steps=8, guidance_scale=4.5, height=64, width=96, num_frames=7, fps=12,
        lora="style", metadata={"seed": 1, "tags": ["a", None], "more": {"x": 0.5}},
    ),
    Cancel(job_id="j"),
    Shutdown(epoch=3),
    Heartbeat(gpu_bytes=7),
    Heartbeat(),
    Loading(what="importing", done=1.5, total=None),
    Ready(seconds=0.5, device="cpu", versions={"torch": "2"}),
    Stage(job_id="j", stage="text"),
    Resumed(job_id="j", step=4),
    STEP,
    Tiles(job_id="j", done=1, total=4),
    Latent(job_id="j", step=1, image="data:"),
    DONE,
    Followed(job_id="j"),
    Failed(job_id="j", error="no", disk_full=True),
    Cancelled(job_id="j"),
)  # fmt: skip
FIELDS = [(message, item.name) for message in ALL for item in fields(message)]


def record(message: Message) -> dict[str, Any]:
    """What stands in its line."""
    found: dict[str, Any] = json.loads(encode(message))
    return found


def line(told: Any) -> bytes:
    return json.dumps(told).encode() + b"\n"


def leaves(kind: type[Message]) -> set[str]:
    """By name, since a dataclass with slots leaves its first draft among the subclasses."""
    return {name for sub in kind.__subclasses__() for name in leaves(sub)} or {kind.__name__}


def test_every_message_is_tried() -> None:
    assert {type(message).__name__ for message in ALL} == leaves(Message) - {"JobEvent"}


@pytest.mark.parametrize("message", ALL, ids=repr)
def test_a_message_survives_its_line(message: Message) -> None:
    told = encode(message)
    assert told.endswith(b"\n")
    assert told.count(b"\n") == 1
    assert decode(told) == message
    assert type(decode(told)) is type(message)


@pytest.mark.parametrize(("message", "name"), FIELDS)
def test_a_value_of_another_type_is_named(message: Message, name: str) -> None:
    with pytest.raises(ProtocolError, match=f"{type(message).__name__}: {name}=.*: expected"):
        decode(line(record(message) | {name: [1]}))


@pytest.mark.parametrize(("message", "name"), FIELDS)
def test_a_field_that_is_missing_is_named(message: Message, name: str) -> None:
    told = record(message)
    del told[name]
    with pytest.raises(ProtocolError, match=f"{type(message).__name__} without {name}"):
        decode(line(told))


@pytest.mark.parametrize("message", ALL, ids=repr)
def test_a_field_too_many_is_named(message: Message) -> None:
    with pytest.raises(ProtocolError, match=f"{type(message).__name__}: extra=1: expected no such"):
        decode(line(record(message) | {"extra": 1}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", "a"), ("step", "1"), ("step", True), ("step", 1.0), ("step", None),
     ("seconds", "1"), ("seconds", False), ("job_id", 7), ("epoch", "0")],
)  # fmt: skip
def test_nothing_is_taken_for_what_it_resembles(field: str, value: Any) -> None:
    step = record(STEP)
    with pytest.raises(ProtocolError, match=f"Step: {field}={value!r}: expected a valid"):
        decode(line(step | {field: value}))


@pytest.mark.parametrize("value", [{"a": "1"}, {"a": True}, {"a": None}])
def test_what_a_mapping_holds_is_checked_too(value: Any) -> None:
    done = record(DONE)
    with pytest.raises(ProtocolError, match=r"Done: seconds\.a=.*: expected a valid number"):
        decode(line(done | {"seconds": value}))


def test_a_whole_number_does_for_seconds() -> None:
    step = record(STEP)
    decoded = decode(line(step | {"seconds": 1}))
    assert decoded == Step(job_id="j", step=1, steps=8, seconds=1.0)


@pytest.mark.parametrize(
    "told",
    [[], None, 7, "Step", {}, {"type": "Message"}, {"type": "JobEvent"}, {"type": "step"},
     {"type": None}, {"type": []}, {"type": {"Step": 1}}],
)  # fmt: skip
def test_what_is_no_message_says_what_would_be(told: Any) -> None:
    with pytest.raises(ProtocolError, match=r"expected .*(object|Configure)"):
        decode(line(told))


@pytest.mark.parametrize("text", [b"", b"\n", b"{not json}\n", b"\xff\xfe\n", b"[" * 100_000])
def test_what_is_no_json_is_a_protocol_error(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        messages.decode(text)


def test_an_error_stays_short_whatever_came() -> None:
    step = record(STEP)
    with pytest.raises(ProtocolError) as caught:
        decode(line(step | {"step": "x" * 100_000, "y" * 100_000: 1}))
    assert len(str(caught.value)) < 500
