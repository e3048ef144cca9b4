"""The parent's side of the download: starts the command, reads its events, ends it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mochi_app.child_process import ChildProcess
from mochi_app.codec import ProtocolError
from mochi_app.weights.events import Done, Event, Failure, Notice, Progress, WeightsError, decode
from mochi_app.weights.files import PartTypes

log = logging.getLogger(__name__)

SILENCE_SECONDS = 180.0  # the command reports every BEAT_SECONDS
WEIGHTS_COMMAND: tuple[str, ...] = (sys.executable, "-m", "mochi_app.weights")


async def fetch_weights(
    model: str,
    types: PartTypes,
    on_progress: Callable[[Progress], None],
    command: Sequence[str] = WEIGHTS_COMMAND,
    silence: float = SILENCE_SECONDS,
) -> Path:
    """Run the command as a child and return the folder; a cancel kills the child.

    `on_progress` is called on the loop; notices go to the log. A child that prints nothing for
    `silence` seconds is killed. Must run on the loop's own thread: the death signal that the child
    asks for follows the thread.

    Raises:
        WeightsError: the child reported one, died or hung.
        OSError: it could not be started.
    """
    asked = ["--model", _absolute(model), "--dtype", types.transformer]
    asked += ["--text-dtype", types.text_encoder, "--vae-dtype", types.vae]
    child = ChildProcess("the download process")
    await child.start([*command, *asked], "weights", speaks=True)
    outcome: Event | None = None
    try:
        while line := await _line(child.stdout, silence):
            outcome = _take(line, on_progress) or outcome
        if await child.wait(silence) is None:
            raise TimeoutError
        await child.last_words()
    except TimeoutError:
        raise WeightsError(
            f"{child.label} said nothing for {silence:g} seconds: "
            "check the disk of the cache and the network",
            retry=True,
        ) from None
    except ProtocolError as error:
        raise WeightsError(f"{child.label} broke the protocol: {error}", retry=True) from error
    finally:
        await child.end()
    if isinstance(outcome, Done) and child.returncode == 0:
        return Path(outcome.folder)
    if isinstance(outcome, Failure):
        raise WeightsError(outcome.error, outcome.retry)
    raise WeightsError(child.ending(lacking=" and no result"), retry=True)


async def _line(stream: asyncio.StreamReader, seconds: float) -> bytes:
    """The next line. Raises TimeoutError, or ProtocolError if it is too long."""
    async with asyncio.timeout(seconds):
        try:
            return await stream.readline()
        except ValueError as error:
            raise ProtocolError(str(error)) from error


def _absolute(model: str) -> str:
    """A folder by its full path, since the child has its own working directory."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _take(line: bytes, on_progress: Callable[[Progress], None]) -> Event | None:
    """Handle one line; returns its event if it is the last one."""
    event = decode(line)
    if isinstance(event, Progress):
        on_progress(event)
    elif isinstance(event, Notice):
        log.warning("%s", event.text)
    elif event is None:
        log.info("weights: %s", line.decode("utf-8", "backslashreplace").rstrip())
    return event if isinstance(event, Done | Failure) else None
