"""Checkpoints: a run that ended early goes on to the same frames, or begins anew, never between."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mochi_app.engine import checkpoint, start
from mochi_app.engine.checkpoint import Checkpoint
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import Precision, open_pipeline
from mochi_app.engine.pipeline import Engine, Result
from mochi_app.messages import JobEvent, Message, Resumed, Run, Stage, Step
from tests.checkpoints import CONFIG, SHAPE, latents
from tests.lora_files import write_lora
from tests.places import TINY
from tests.ranks import run_ranks

REQUEST = Run(
    job_id="j", prompt="a red ball rolls right", negative_prompt="", seed=3,
    num_inference_steps=8, guidance_scale=3.0, height=64, width=80, num_frames=7, fps=12,
    checkpoint_steps=3,
)  # fmt: skip


class Lost(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for number, name in enumerate(("one", "two")):
        write_lora(folder, name, seed=number)
    return folder


@pytest.fixture(scope="module")
def engine(loras: Path) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    config = replace(CONFIG, threads=1, lora_dir=str(loras), scratch=str(loras))
    yield start.load(config, lambda message: None)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Result:
    """What an undisturbed run without checkpoints yields."""
    return make(engine, replace(REQUEST, checkpoint_steps=0))[0]


@pytest.fixture
def request_(tmp_path: Path) -> Run:
    """The request with a place for its checkpoint."""
    (tmp_path / "checkpoints").mkdir()
    return replace(REQUEST, checkpoint=str(tmp_path / "checkpoints" / "j" / "latents.safetensors"))


def make(engine: Engine, request: Run) -> tuple[Result, list[Message]]:
    """A run to its end, and what it said."""
    events: list[Message] = []
    result = engine.run(request, events.append, lambda: False)
    assert result is not None
    return result, events


def lose(engine: Engine, request: Run, step: int) -> None:
    """A run that ends as soon as it has told of `step`; one beyond the last is the decoding."""

    def hear(message: Message) -> None:
        decoding = isinstance(message, Stage) and message.stage == "decode"
        if decoding or (isinstance(message, Step) and message.step == step):
            raise Lost

    with pytest.raises(Lost):
        engine.run(request, hear, lambda: False)


def steps_of(events: list[Message]) -> list[int]:
    return [event.step for event in events if isinstance(event, Step)]


def resumed_at(events: list[Message]) -> list[int]:
    return [event.step for event in events if isinstance(event, Resumed)]


@pytest.mark.parametrize(("lost", "kept"), [(2, 0), (4, 3), (6, 3), (9, 6)])
def test_a_lost_run_goes_on_to_the_same_frames_from_its_last_checkpoint(
    engine: Engine, plain: Result, request_: Run, lost: int, kept: int
) -> None:
    lose(engine, request_, lost)
    result, events = make(engine, request_)
    assert steps_of(events) == list(range(kept + 1, 9))
    assert {event.steps for event in events if isinstance(event, Step)} == {8}
    assert resumed_at(events) == ([kept] if kept else [])
    assert (result.frames_hash, result.latents_hash) == (plain.frames_hash, plain.latents_hash)
    assert all(isinstance(event, JobEvent) for event in events)


def test_a_run_lost_again_and_again_does_each_step_once_or_less_than_four_times(
    engine: Engine, plain: Result, request_: Run
) -> None:
    done: list[int] = []
    for _ in range(4):  # each comes three steps further: 1-4, 4-7, 7-8 and the decoding

        def hear(message: Message, began: int = len(done)) -> None:
            if isinstance(message, Step):
                done.append(message.step)
            if len(done) == began + 4:
                raise Lost

        try:
            result = engine.run(request_, hear, lambda: False)
            break
        except Lost:
            continue
    assert done == [1, 2, 3, 4, 4, 5, 6, 7, 7, 8]
    assert result is not None
    assert result.frames_hash == plain.frames_hash


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "fast"},
        {"guidance_scale": 1.0},
        {"lora": "one", "lora_scale": 0.5},
    ],
    ids=["fast", "no guidance", "lora"],
)
def test_so_it_is_for_other_runs(engine: Engine, request_: Run, change: dict[str, Any]) -> None:
    request = replace(request_, **change)
    expected = make(engine, replace(request, checkpoint_steps=0))[0]
    lose(engine, request, 5)
    result, events = make(engine, request)
    assert resumed_at(events) == [3]
    assert result.frames_hash == expected.frames_hash


def test_a_cancel_in_a_resumed_run_is_heard_at_its_step(engine: Engine, request_: Run) -> None:
    lose(engine, request_, 4)
    events: list[Message] = []
    assert engine.run(request_, events.append, lambda: steps_of(events)[-1:] == [5]) is None
    assert steps_of(events) == [4, 5]
    assert resumed_at(make(engine, request_)[1]) == [3]


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "k"},
        {"prompt": "a red ball rolls left"},
        {"negative_prompt": "a blue square"},
        {"seed": 4},
        {"num_inference_steps": 10},
        {"guidance_scale": 3.5},
        {"guidance_scale": 1.0},
        {"height": 80},
        {"width": 64},
        {"num_frames": 13},
        {"schedule": "fast"},
        {"lora": "two"},
        {"lora_scale": 0.25},
    ],
    ids=lambda change: " ".join(map(str, *change.items())),
)
def test_what_another_request_left_is_removed(
    engine: Engine, request_: Run, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    left = replace(request_, lora="one", lora_scale=0.5)
    checkpoints, same, other = (
        engine._checkpoints(request, (1, 2)) for request in (left, left, replace(left, **change))
    )
    assert checkpoints is not None
    assert same is not None
    assert other is not None
    checkpoints.keep(3, latents())
    checkpoints.settle()
    assert same.resume(SHAPE) is not None
    with caplog.at_level(logging.WARNING):
        assert other.resume(SHAPE) is None
    assert "its checkpoint is not used: of another " in caplog.text
    assert next(iter(change)) in caplog.text
    assert not Path(request_.checkpoint).parent.exists()


def test_a_lora_file_that_changed_meanwhile_begins_the_run_anew(
    engine: Engine, request_: Run, loras: Path
) -> None:
    request = replace(request_, lora="one")
    lose(engine, request, 4)
    shutil.copyfile(loras / "two.safetensors", loras / "one.safetensors")
    result, events = make(engine, request)
    assert steps_of(events) == list(range(1, 9))
    expected = make(engine, replace(request, lora="two", checkpoint_steps=0))[0]
    assert result.frames_hash == expected.frames_hash


def test_a_run_on_more_threads_begins_anew(engine: Engine, request_: Run) -> None:
    """Sums on a CPU may depend on how they are split."""
    lose(engine, request_, 4)
    torch.set_num_threads(2)
    try:
        assert resumed_at(make(engine, request_)[1]) == []
    finally:
        torch.set_num_threads(1)


def test_a_disk_that_refuses_checkpoints_costs_no_frame(
    engine: Engine, plain: Result, request_: Run, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(request_.checkpoint).parent.parent
    folder.rmdir()
    folder.touch()
    with caplog.at_level(logging.WARNING):
        result, events = make(engine, request_)
    assert result.frames_hash == plain.frames_hash
    assert steps_of(events) == list(range(1, 9))
    assert caplog.text.count("no checkpoint was left: Not a directory") == 2


def test_a_step_is_told_after_the_checkpoint_before_it_is_durable(
    engine: Engine, request_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    write = checkpoint.write
    slow = threading.Event()

    def write_slowly(path: Path, kept: Checkpoint, stamp: checkpoint.Stamp) -> None:
        slow.wait(0.3)  # seconds: longer than a step
        write(path, kept, stamp)
        told.append(f"kept {kept.step}")

    def hear(message: Message) -> None:
        if isinstance(message, Step):
            told.append(f"step {message.step}")

    monkeypatch.setattr(checkpoint, "write", write_slowly)
    engine.run(request_, hear, lambda: False)
    assert told[2:5] == ["step 3", "kept 3", "step 4"]
    assert told[6:9] == ["step 6", "kept 6", "step 7"]


@pytest.mark.parametrize("off", ["no steps", "a cache"])
def test_without_checkpoints_nothing_is_written_or_read(
    engine: Engine, request_: Run, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(engine, request_, 4)
    file = Path(request_.checkpoint)
    before = file.stat().st_mtime_ns
    request = request_
    if off == "no steps":
        request = replace(request_, checkpoint_steps=0)
    else:
        monkeypatch.setattr(engine, "_facts", None)
    assert steps_of(make(engine, request)[1]) == list(range(1, 9))
    assert file.stat().st_mtime_ns == before


def test_a_cached_engine_has_no_checkpoints(engine: Engine, tmp_path: Path) -> None:
    """A cache is carried from step to step, and no checkpoint has it."""
    assert engine._facts is not None
    config = replace(CONFIG, threads=1, cache_threshold=0.1, scratch=str(tmp_path))
    cached = start.load(config, lambda message: None)
    assert cached._facts is None


def test_a_checkpoint_comes_after_every_so_many_steps_but_the_last(
    engine: Engine, request_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(checkpoint, "write", lambda path, found, stamp: kept.append(found.step))
    make(engine, replace(request_, checkpoint_steps=2))
    assert kept == [2, 4, 6]


def by_ranks(path: Path, ranks: Ranks) -> dict[str, Any]:
    """On each rank: an undisturbed run, one that is lost on all, one that goes on, one after the
    file was torn."""
    torch.set_num_threads(1)
    exact = Precision(torch.float32, torch.float32, torch.float32)
    pipe = open_pipeline(str(TINY), exact, torch.device("cpu"), text=ranks.first)
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, ranks=ranks, facts={})
    request = replace(REQUEST, checkpoint=str(path))
    results: dict[str, Any] = {"plain": outcome(engine, replace(request, checkpoint=""))}
    looks = iter(range(100))
    # Text, denoise, then one look after each step: all ranks stop after the fifth
    assert engine.run(request, lambda message: None, lambda: next(looks) >= 6) is None
    results["resumed"] = outcome(engine, request)
    if ranks.first:
        path.write_bytes(path.read_bytes()[:-1])
    results["torn"] = outcome(engine, request)
    return results


def outcome(engine: Engine, request: Run) -> tuple[list[int], str, str]:
    result, events = make(engine, request)
    return steps_of(events), result.frames_hash, result.latents_hash


def test_all_ranks_go_on_or_begin_together(tmp_path: Path) -> None:
    path = tmp_path / "j" / "latents.safetensors"
    first, second = run_ranks(2, partial(by_ranks, path), tmp_path / "ranks", limit=90)
    every = list(range(1, 9))
    _, frames, noise = first["plain"]
    assert first["resumed"] == (every[3:], frames, noise)
    assert first["torn"] == (every, frames, noise)
    assert {case: steps for case, (steps, *_) in second.items()} == {case: [] for case in first}
