"""The file of a checkpoint: of which run it is, written whole or not at all, read or removed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi_app.engine import checkpoint, start
from mochi_app.engine.checkpoint import Checkpoint, CheckpointWriter
from mochi_app.engine.loading import Precision
from tests.checkpoints import CONFIG, SHAPE, STAMP, latents


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a checkpoint."""
    return tmp_path / "j" / "latents.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "_native_math"},
        {"cache_threshold": 0.1},
        {"compile": True},
        {"quantization": "int8"},
        {"offload": "model"},
        {"world_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_other_options_is_another(change: dict[str, Any]) -> None:
    assert checkpoint.of_configuration(replace(CONFIG, **change)) != checkpoint.of_configuration(
        CONFIG
    )


def test_a_checkpoint_of_other_weights_or_types_is_another(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    (model / "vae" / "weights").write_bytes(b"1")
    before = checkpoint.fingerprint(model)
    (model / ".lock").touch()
    assert checkpoint.fingerprint(model) == before
    (model / "vae" / "weights").write_bytes(b"12")
    assert checkpoint.fingerprint(model) != before
    small, exact = torch.bfloat16, torch.float32
    types = [(exact, exact, exact), (small, exact, exact), (exact, small, exact)]
    assert len({str(start.precision_facts(Precision(*each))) for each in types}) == 3


def test_what_is_written_is_read(path: Path) -> None:
    for step in (3, 6):
        checkpoint.write(path, Checkpoint(step, latents(step)), STAMP)
    found = checkpoint.read(path, STAMP, SHAPE)
    assert found is not None
    assert found.step == 6
    assert np.array_equal(found.latents, latents(6))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert checkpoint.read(path.parent / "other" / path.name, STAMP, SHAPE) is None
    assert checkpoint.read(path / path.name, STAMP, SHAPE) is None


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        flipped,
        lambda content: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
        lambda content: content.replace(b'"format":"1"', b'"format":"2"'),
        lambda content: content.replace(b'"step":"3"', b'"step":"8"'),
        lambda content: content.replace(b'"step":"3"', b'"step":"x"'),
        lambda content: content.replace(b'"format"', b'"formal"'),
    ],
    ids=[
        "empty", "no header", "half a header", "a byte less", "a byte more", "a flipped bit",
        "a pickle", "a later format", "no step left", "no number", "no format",
    ],
)  # fmt: skip
def test_what_is_torn_or_strange_is_removed(path: Path, harm: Callable[[bytes], bytes]) -> None:
    checkpoint.write(path, Checkpoint(3, latents()), STAMP)
    content = path.read_bytes()
    harmed = harm(content)
    assert harmed != content
    path.write_bytes(harmed)
    assert checkpoint.read(path, STAMP, SHAPE) is None
    assert not path.parent.exists()


def test_latents_of_another_shape_are_not_taken(path: Path) -> None:
    checkpoint.write(path, Checkpoint(3, latents()), STAMP)
    assert checkpoint.read(path, STAMP, (1, 12, 2, 8, 11)) is None


def test_a_write_that_fails_leaves_the_older_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(path, Checkpoint(3, latents()), STAMP)

    def full(*names: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, Checkpoint(6, latents()), STAMP)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = checkpoint.read(path, STAMP, SHAPE)
    assert found is not None
    assert found.step == 3


def test_a_disk_that_hangs_is_waited_for_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, written = threading.Event(), []

    def hang(path: Path, kept: Checkpoint, stamp: checkpoint.Stamp) -> None:
        written.append(kept.step)
        hanging.wait()

    waits: list[float] = []
    join = threading.Thread.join
    monkeypatch.setattr(checkpoint, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint, "write", hang)

    def note(thread: threading.Thread, limit: float) -> None:
        waits.append(limit)
        join(thread, limit)

    monkeypatch.setattr(threading.Thread, "join", note)
    checkpoints = CheckpointWriter(path, 1, STAMP)
    for step in (1, 2, 3):
        checkpoints.settle()
        checkpoints.keep(step, latents())
    assert written == [1]
    assert waits == [0.01, 0, 0, 0]
    hanging.set()
    assert checkpoints._writing is not None
    join(checkpoints._writing)
    checkpoints.keep(4, latents())
    checkpoints.settle()
    assert written == [1, 4]


def test_numbers_that_are_not_finite_are_not_kept(path: Path) -> None:
    checkpoints = CheckpointWriter(path, 1, STAMP)
    checkpoints.keep(1, latents(float("nan")))
    checkpoints.settle()
    assert not path.exists()
