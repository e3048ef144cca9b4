"""The weights of a model, on this box before any rank starts: found, downloaded, checked.

A command of its own, so that it can be killed and a hang holds nobody up:

    python -m mochi_app.engine.weights --model genmo/mochi-1-preview --dtype bfloat16

It prints events as JSON lines (`weight_events.py`), the last of them `done` (exit status 0) or
`error` (1); the parent's side of it is `fetch_weights`. Neither side imports torch; huggingface_hub
is the child's alone (`hub_cache.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mochi_app.engine.hub_cache import PATIENCE_SECONDS, Options, provide
from mochi_app.engine.lifeline import die_with_parent, leave
from mochi_app.engine.weight_events import (
    Done,
    Event,
    Failure,
    Notice,
    Progress,
    WeightsError,
    decode,
    emit_line,
)
from mochi_app.engine.weight_files import DTYPES, PartTypes
from mochi_app.logs import level_of
from mochi_app.platforms import signal_name

log = logging.getLogger(__name__)

PROJECT_DIR = Path(__file__).resolve().parents[2]
SILENCE_SECONDS = 180.0  # the command reports every BEAT_SECONDS
WEIGHTS_COMMAND: tuple[str, ...] = (sys.executable, "-m", "mochi_app.engine.weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="mochi_app.engine.weights", description="Bring a model's weights onto this box."
    )
    parser.add_argument("--model", required=True, help="id on the Hub, or a folder")
    parser.add_argument("--dtype", required=True, choices=DTYPES, help="the transformer's")
    parser.add_argument("--text-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--vae-dtype", choices=DTYPES, help="that of --dtype if omitted")
    parser.add_argument(
        "--free-margin-gib", type=float, default=2, help="GiB that must stay free on the disk"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        help="seconds that a file may bring no byte, retries included",
    )
    given = parser.parse_args(argv)
    # Xet has no partial files to go on with, bars would fill the log. Read when hub is imported.
    for name in ("XET", "PROGRESS_BARS", "TELEMETRY"):
        os.environ[f"HF_HUB_DISABLE_{name}"] = "1"
    types = PartTypes(given.dtype, given.text_dtype, given.vae_dtype or given.dtype)
    options = Options(types, int(given.free_margin_gib * (1 << 30)), given.patience)
    try:
        folder = provide(given.model, options, emit_line)
    except WeightsError as error:
        emit_line(Failure(str(error), error.retry))
        leave(1)  # other files' threads may wait for the network
    emit_line(Done(str(folder)))
    return 0


# The parent's side


async def fetch_weights(
    model: str,
    types: PartTypes,
    on_progress: Callable[[Progress], None],
    command: Sequence[str] = WEIGHTS_COMMAND,
    silence: float = SILENCE_SECONDS,
) -> Path:
    """Run the command as a child and return the folder; a cancel kills the child.

    `on_progress` is called on the loop; notices go to the log. A child that says nothing for
    `silence` seconds is killed. Must run on the loop's own thread: the death signal that the child
    asks for follows the thread.

    Raises:
        WeightsError: as the child says, or because it died or hung.
        OSError: it could not be started.
    """
    asked = ["--model", _absolute(model), "--dtype", types.transformer]
    asked += ["--text-dtype", types.text_encoder, "--vae-dtype", types.vae]
    process = await _spawn(*command, *asked)
    assert process.stdout is not None
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=1)
    listening = asyncio.create_task(_keep_stderr(process.stderr, tail))
    outcome: Event | None = None
    try:
        while line := await _line(process.stdout, silence):
            outcome = _take(line, on_progress) or outcome
        await process.wait()
        await listening
    except TimeoutError:
        raise WeightsError(
            f"the download process (pid {process.pid}) said nothing for {silence:g} seconds: "
            "check the disk of the cache and the network",
            retry=True,
        ) from None
    finally:
        listening.cancel()
        await _end(process)
    if isinstance(outcome, Done) and process.returncode == 0:
        return Path(outcome.folder)
    if isinstance(outcome, Failure):
        raise WeightsError(outcome.error, outcome.retry)
    raise WeightsError(_ending(process, tail), retry=True)


async def _line(stream: asyncio.StreamReader, seconds: float) -> bytes:
    """The next line; raises TimeoutError."""
    async with asyncio.timeout(seconds):
        return await stream.readline()


def _absolute(model: str) -> str:
    """A folder by its full path, since the child has a working directory of its own."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _take(line: bytes, on_progress: Callable[[Progress], None]) -> Event | None:
    """Hand on what a line says; the event if it is the last one."""
    event = decode(line)
    if isinstance(event, Progress):
        on_progress(event)
    elif isinstance(event, Notice):
        log.warning("%s", event.text)
    elif event is None:
        log.info("weights: %s", line.decode("utf-8", "backslashreplace").rstrip())
    return event if isinstance(event, Done | Failure) else None


async def _spawn(*command: str) -> asyncio.subprocess.Process:
    """Start the child; a cancel meanwhile waits for it and kills it."""
    start = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            cwd=PROJECT_DIR,
        )
    )
    try:
        return await asyncio.shield(start)
    except asyncio.CancelledError:
        await asyncio.wait([start])
        if not start.cancelled() and start.exception() is None:
            await _end(start.result())
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the child if it lives, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    transport: Any = process._transport  # type: ignore[attr-defined]
    transport.close()  # else it closes itself later, when the loop may have ended


async def _keep_stderr(stream: asyncio.StreamReader, tail: deque[str]) -> None:
    """Log the child's stderr and keep its last line."""
    while chunk := await stream.read(8192):  # a line may be longer than any limit
        for line in chunk.decode("utf-8", "backslashreplace").splitlines():
            if text := line.strip():
                tail.append(text)
                log.log(level_of(text), "weights: %s", text)


def _ending(process: asyncio.subprocess.Process, tail: Sequence[str]) -> str:
    """How a child ended that did not say so itself."""
    who, code = f"the download process (pid {process.pid})", process.returncode or 0
    if code < 0:
        return f"{who} was killed by {signal_name(-code)}: it goes on at the next start"
    words = f": {tail[-1]}" if tail else ""
    return f"{who} ended with code {code} and no result{words}"


if __name__ == "__main__":
    sys.exit(main())
