"""The child process of one GPU: reads commands, runs jobs one at a time, sends events.

Started by a slot as `python -m mochi_app.engine.rank --channel FD`, where FD is one end of a stream
socketpair that speaks `mochi_app.messages`. Owns the process: its threads, its end, and the
answer to every command. It does not own the model (`pipeline.py`) or the encoder (`encode.py`), and
imports neither, nor torch, until it has reported to the parent.

Three threads: the main one loads and computes; a reader takes commands, so that a cancel arrives
while the main thread computes, and ends the process when the parent is gone; a third sends
heartbeats. A test program passes `main` its own loader and fakes the model, never the process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mochi_app import logs
from mochi_app.child_process import die_with_parent, leave
from mochi_app.codec import ProtocolError
from mochi_app.disk_errors import DISK_FULL, mentions
from mochi_app.engine.channel import Channel, Inbox
from mochi_app.engine.scratch import Scratch, refused
from mochi_app.errors import one_line
from mochi_app.messages import (
    Cancelled,
    Configure,
    Done,
    Failed,
    Followed,
    Heartbeat,
    JobEvent,
    Loading,
    Message,
    Ready,
    Run,
    Stage,
)

if TYPE_CHECKING:
    from mochi_app.engine.encode import Frames


logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
EXIT_PROTOCOL = 3

Emit = Callable[[Message], None]


class Result(Protocol):
    """What a run yields. `seconds` by stage: text, denoise, decode; `frames` RGB (F, H, W, 3).

    Only the first rank has frames; the others have None.
    """

    @property
    def frames(self) -> Frames | None: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def latents_hash(self) -> str: ...
    @property
    def frames_hash(self) -> str: ...


class Engine(Protocol):
    """A loaded model, as far as this module is concerned.

    `run` sends its own Stage, Step and Latent events, checks `cancelled` at every boundary, the
    first before any work, and returns None if it stopped for that reason; all ranks of a slot
    stop at the same boundary. `free` releases memory after a failed run.
    """

    @property
    def device(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    def run(self, request: Run, emit: Emit, cancelled: Callable[[], bool]) -> Result | None: ...
    def free(self) -> None: ...


Loader = Callable[[Configure, Emit], Engine]


def load_mochi(config: Configure, emit: Emit) -> Engine:
    """Import the model's libraries, then load it: the loader of every real rank."""
    # OpenMP threads that spin while they wait starve each other when cores are shared: the steps of
    # the embedded model took ten times as long beside one busy process. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mochi_app.engine import start

    emit(Loading(what="loading weights"))
    return start.load(config, emit)


def main(argv: Sequence[str] | None = None, loader: Loader = load_mochi) -> int:
    """Run the process to its end; returns the exit status of an orderly one.

    Raises:
        SystemExit: the command line or the first message is wrong.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="mochi_app.engine.rank", description="One engine rank.")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket")
    channel = Channel(parser.parse_args(argv).channel)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=logs.FORMAT)
    config = configure(channel)
    logs.filter_libraries(config.log_level, libraries_of(config))
    inbox = Inbox()
    for name, target in (("heartbeat", beat), ("reader", read)):
        arguments = (channel,) if target is beat else (channel, inbox)
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
    scratch = Scratch(config.scratch)
    with contextlib.suppress(OSError):  # reported when a video is written
        scratch.folder()
    engine = load(config, channel, loader)
    while (request := inbox.take()) is not None:
        outcome = attempt(engine, scratch, request, channel.send, inbox.cancelled)
        inbox.finish()
        if isinstance(outcome, Failed):
            engine.free()
        channel.send(outcome)
    return 0


def configure(channel: Channel) -> Configure:
    """Read the first message, which sets the epoch of all messages sent."""
    command = channel.receive()
    if command is None:
        raise SystemExit(0)
    if not isinstance(command, Configure):
        raise SystemExit(f"expected Configure as the first message, got {type(command).__name__}")
    channel.epoch = command.epoch
    return command


def libraries_of(config: Configure) -> set[str]:
    """The packages that this configuration needs besides those of every other: their warnings
    concern whoever configured them."""
    words = {"torchao"} if config.quantization == "int8" else set()
    if config.compile:
        words |= {"torch._dynamo", "torch._inductor", "triton"}
    if config.attention != "native":
        words |= {"attention", "flash_attn", "xformers"}
    return words


def beat(channel: Channel) -> None:
    """Thread: send a heartbeat at once and then every second."""
    while True:
        channel.send(Heartbeat(gpu_bytes=gpu_bytes()))
        time.sleep(HEARTBEAT_SECONDS)


def gpu_bytes() -> int | None:
    """Bytes that torch holds on the GPU; None where it uses none. Asks no driver, so it never
    waits for a kernel."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # absent while another thread imports torch
    if cuda is None or not getattr(cuda, "is_initialized", bool)():
        return None
    return int(cuda.memory_reserved())


def read(channel: Channel, inbox: Inbox) -> None:
    """Thread: queue commands; exit when the parent is gone or breaks the protocol."""
    try:
        while (command := channel.receive()) is not None:
            inbox.put(command)
    except ProtocolError as error:
        sys.stderr.write(f"channel: {error}\n")
        leave(EXIT_PROTOCOL)
    leave(0)


def load(config: Configure, channel: Channel, loader: Loader) -> Engine:
    """Load the model and report each stage of it.

    If loading fails, the process exits with status 1 and the reason as the last line on stderr: at
    once, because an orderly exit would wait for other ranks and print more.
    """
    started = time.perf_counter()
    channel.send(Loading(what="importing"))
    try:
        engine = loader(config, channel.send)
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        sys.stderr.write(f"model did not load: {one_line(error, paths=True)}\n")
        leave(1)
    seconds = time.perf_counter() - started
    channel.send(Ready(seconds=seconds, device=engine.device, versions=engine.versions))
    logger.info("slot %d rank %d ready in %.1f s", config.slot, config.rank, seconds)
    return engine


def attempt(
    engine: Engine, scratch: Scratch, request: Run, emit: Emit, cancelled: Callable[[], bool]
) -> JobEvent:
    """Run one job and return how it ended; an ordinary exception is an outcome, not a crash."""
    try:
        return make_video(engine, scratch, request, emit, cancelled)
    except Exception as error:
        logger.exception("job %s failed", request.job_id)
        return failure(request, error)


def make_video(
    engine: Engine, scratch: Scratch, request: Run, emit: Emit, cancelled: Callable[[], bool]
) -> JobEvent:
    """Run the model, then write video and poster into the scratch folder."""
    from mochi_app.engine import encode as media

    try:  # refuse what cannot be written before it costs anything
        media.comment(request.metadata)
    except media.EncodeError as error:
        return replace(failure(request, error), settled=True)
    result = engine.run(request, emit, cancelled)
    if result is None or cancelled():
        return Cancelled(job_id=request.job_id)
    if result.frames is None:
        return Followed(job_id=request.job_id)
    emit(Stage(job_id=request.job_id, stage="encode"))
    started = time.perf_counter()
    folder = Path(scratch.path)
    try:
        folder = scratch.folder()
        output = media.save(
            result.frames,
            folder,
            request.job_id,
            fps=request.fps,
            prompt=request.prompt,
            metadata=request.metadata,
        )
    except (media.EncodeError, OSError) as error:
        if not refused(error, folder):
            raise
        logger.exception("job %s: its video could not be written", request.job_id)
        return replace(failure(request, error), unwritten=True)
    return Done(
        job_id=request.job_id,
        video=output.video,
        poster=output.poster,
        seconds=dict(result.seconds) | {"encode": time.perf_counter() - started},
        latents_hash=result.latents_hash,
        frames_hash=result.frames_hash,
    )


def failure(request: Run, error: Exception) -> Failed:
    """The message of a failed job, and whether the process can go on.

    An error with a true `settled` was raised by all ranks at the same point. torch's errors are
    recognised by class name, so that this module need not import it. Running out of memory fails
    only the job; after a CUDA or NCCL error nothing on the device can be relied on.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    poisoned = "AcceleratorError" in names or re.search(
        r"CUDA (driver )?error|(CUBLAS|CUDNN)_STATUS_(?!ALLOC)|NCCL|device-side assert",
        text,
    )
    memory = names & {"OutOfMemoryError", "MemoryError"} or re.search(
        r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", text
    )
    message = one_line(error)
    if memory:
        size = f"{request.width}x{request.height} pixels, {request.num_frames} frames"
        message = f"out of memory at {size}: ask for a smaller size or fewer frames"
    return Failed(
        job_id=request.job_id,
        error=message,
        poisoned=bool(poisoned),
        settled=bool(getattr(error, "settled", False)),
        disk_full=disk_full(error),
    )


def disk_full(error: Exception) -> bool:
    """Whether the system, or ffmpeg quoting it, reported that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return mentions(str(error), DISK_FULL)


if __name__ == "__main__":
    sys.exit(main())
