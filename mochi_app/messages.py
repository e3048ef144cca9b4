"""The messages that cross the process boundary, and their one encoding: a JSON object a line.

A slot sends commands (`Configure`, `Run`, `Cancel`, `Shutdown`) and a rank answers with events.
Each message carries the `epoch` of the process it belongs to, so that a late one from a dead
process is told from a live one. Both sides load this module, and cheaply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mochi_app.codec import Codec
from mochi_app.parameters import Parameters

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Message:
    """Anything on the channel. `epoch` counts the starts of a slot."""

    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure(Message):
    """First message to a rank: what to load, with whom, and where to write.

    `device` is cpu or cuda; each `dtype` auto, float32 or bfloat16. `rendezvous` is the path of a
    file that does not exist yet, where the ranks of a slot meet; empty for a single rank. The
    largest video by default has `height` and `width` in pixels and `num_frames`; 0 is unknown.
    """

    slot: int
    rank: int
    world_size: int
    model: str
    device: str
    dtype: str
    scratch: str
    threads: int = 0
    rendezvous: str = ""
    text_dtype: str = "auto"
    vae_dtype: str = "auto"
    attention: str = "native"
    cache_threshold: float = 0.0
    compile: bool = False
    quantization: str = "none"
    offload: str = "none"
    lora_dir: str = ""
    height: int = 0
    width: int = 0
    num_frames: int = 0
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Message, Parameters):
    """Make one video. `metadata` goes into the MP4 as it is.

    Every `checkpoint_steps` steps the first rank leaves a checkpoint in the file `checkpoint`, and
    the run goes on from one that is there; an empty path or 0 steps is neither.
    """

    job_id: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    checkpoint_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Message):
    """Stop this job at the next boundary, or before it begins; others are not touched."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown(Message):
    """End the process when nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """The process is alive; says nothing about progress. `gpu_bytes` it holds, None without one."""

    gpu_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading(Message):
    """Start-up goes on. `what` is for people: "importing", "loading weights"."""

    what: str
    done: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Message):
    """The model is loaded. `seconds` since the process was configured."""

    seconds: float
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent(Message):
    """Anything about one job."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(JobEvent):
    """The job enters a stage: text, denoise, decode or encode."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(JobEvent):
    """The run goes on from a checkpoint that an earlier attempt left after `step`."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(JobEvent):
    """Step `step` of `steps` is done; `seconds` is its duration."""

    step: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(JobEvent):
    """`done` of `total` tiles are decoded, by all ranks together."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent(JobEvent):
    """A small picture of the state after `step`: `image` is a data URL."""

    step: int
    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(JobEvent):
    """Video and poster lie in the slot's scratch folder under these names.

    `latents_hash` and `frames_hash` are SHA-256 of the first latents and of the raw RGB frames.
    """

    video: str
    poster: str
    seconds: Mapping[str, float]
    latents_hash: str
    frames_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed(JobEvent):
    """A rank other than the first has done its part; the first will say what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(JobEvent):
    """The job failed. With `poisoned` the process cannot be trusted and will be replaced; with
    `settled` all ranks failed together, and none waits for another; with `disk_full` the video is
    what could not be written, and so it is with `unwritten`, as its folder cannot be used."""

    error: str
    disk_full: bool = False
    unwritten: bool = False
    poisoned: bool = False
    settled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(JobEvent):
    """The job stopped at a boundary, as asked; the slot stays ready."""


_TYPES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Configure, Run, Cancel, Shutdown, Heartbeat, Loading, Ready,
        Stage, Resumed, Step, Tiles, Latent, Done, Followed, Failed, Cancelled,
    )
}  # fmt: skip
_CODEC = Codec("type", _TYPES)


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return _CODEC.encode(message).encode("ascii")


def decode(line: bytes) -> Message:
    """The message in one line.

    Raises:
        ProtocolError: it is none; see `Codec.decode`.
    """
    return _CODEC.decode(line)
