"""What the download of weights reports to its parent, one JSON line per event; and its error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mochi_app.codec import Codec, ProtocolError, parse


class WeightsError(RuntimeError):
    """There are no weights to load. The message says why and what to do.

    `retry` is whether the same attempt may succeed later without a change to the settings.
    """

    def __init__(self, message: str, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes on this machine, of all that are needed; `file` is one being downloaded, or empty."""

    done: int
    total: int
    file: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that people should know, but that does not stop the download."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The weights are in this folder, which `from_pretrained` loads."""

    folder: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The end without weights; see `WeightsError`."""

    error: str
    retry: bool


Event = Progress | Notice | Done | Failure
Emit = Callable[[Event], None]
_CODEC: Codec[Event] = Codec(
    "event", {"progress": Progress, "notice": Notice, "done": Done, "error": Failure}
)
_output = threading.Lock()


def encode(event: Event) -> str:
    """The event as one line of JSON, newline included."""
    return _CODEC.encode(event)


def decode(line: str | bytes) -> Event | None:
    """The event in a line; None when a library printed something else: no object, or no `event`.

    Raises:
        ProtocolError: it is not a known event; see `Codec.decode`.
    """
    try:
        record = parse(line)
    except ProtocolError:
        return None
    return _CODEC.read(record) if _CODEC.tag in record else None


def emit_line(event: Event) -> None:
    """Write the event to stdout; may be called from any thread."""
    with _output:
        sys.stdout.write(encode(event))
        sys.stdout.flush()


def size_text(size: float, like: float | None = None) -> str:
    """Bytes for people, decimal: `31.0 GB`, `25.3 MB` below one GB; the unit is that of `like`."""
    unit, name = (1e9, "GB") if (size if like is None else like) >= 1e9 else (1e6, "MB")
    return f"{size / unit:.1f} {name}"


def progress_text(progress: Progress) -> str:
    """`downloading 12.3 of 31.0 GB`."""
    done = size_text(progress.done, like=progress.total).split()[0]
    return f"downloading {done} of {size_text(progress.total)}"
