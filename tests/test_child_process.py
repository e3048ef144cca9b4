"""The parent's side of a child process: started, heard, ended, whatever the moment."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import pytest

from mochi_app.weights.events import Progress, WeightsError
from mochi_app.weights.fetch import fetch_weights
from mochi_app.weights.files import PartTypes
from tests.conftest import alive, eventually

FLOAT32 = PartTypes("float32", "float32", "float32")


def ignore(progress: Progress) -> None:
    pass


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


async def fetch(program: str, silence: float = 20.0) -> None:
    await fetch_weights("a/b", FLOAT32, ignore, python(program), silence)


async def test_cancels_during_the_start_leave_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    go = asyncio.Event()
    spawn = asyncio.create_subprocess_exec

    async def slow_spawn(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await spawn(*arguments, **options))
        await go.wait()
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow_spawn)
    task = asyncio.create_task(fetch("import time; time.sleep(60)"))
    await eventually(lambda: started)
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(started[0].pid)


async def test_a_line_on_stderr_is_one_wherever_it_is_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is read in pieces of 8192 bytes, here with an end in the middle of a character."""
    caplog.set_level(logging.INFO)
    program = "import os; os.write(2, ('x' * 8001 + '\\nbegin' + 300 * 'é').encode()); os._exit(1)"
    with pytest.raises(WeightsError, match=f"code 1 and no result: begin{300 * 'é'}$"):
        await fetch(program)
    assert "weights: begin" + 300 * "é" in caplog.messages


async def test_a_line_that_is_too_long_ends_the_download_with_its_reason() -> None:
    with pytest.raises(WeightsError, match="broke the protocol") as caught:
        await fetch("print('x' * 1_000_000)")
    assert caught.value.retry


async def test_a_child_that_shuts_its_stdout_and_lives_on_is_ended() -> None:
    program = "import os, time; os.close(1); time.sleep(60)"
    with pytest.raises(WeightsError, match="said nothing for 1 seconds"):
        await fetch(program, silence=1)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ('{"event": "progress", "done": "1", "total": 2, "file": ""}', "progress: done='1'"),
        ('{"event": "done"}', "done without folder"),
        ('{"event": "done", "folder": "/", "x": 1}', "done: x=1: expected no such field"),
        ('{"event": "error", "error": "e", "retry": 1}', "error: retry=1: expected a valid bool"),
        ('{"event": "bye"}', "event='bye': expected one of progress, notice, done, error"),
    ],
)
async def test_an_event_that_is_none_is_told_by_its_field(event: str, words: str) -> None:
    with pytest.raises(WeightsError, match="broke the protocol") as caught:
        await fetch(f"print({event!r}, flush=True)")
    assert words in str(caught.value)
    assert caught.value.retry
