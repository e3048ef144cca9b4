"""A real rank process with a model that is faked: `python -m tests.engines.fake BEHAVIOUR`.

The behaviour says how it loads; the prompt says how a job goes:
    "slow"         0.05 s a step, cancellable      "fail"    raises
    "hang"         never ends, heartbeat goes on   "poison"  raises a CUDA error
    "kill"         SIGKILL to itself at step 2     "stop"    SIGSTOP to itself at step 2
    "kill once F"  as "kill", unless the file F exists, which it makes
    "fell F"       SIGKILL to the server at step 2, as soon as the file F exists
    "kill at N"    SIGKILL to itself in step N, 0.01 s a step
    "kill on N"    SIGKILL to itself in the N-th step that it does, if there are as many; likewise
    "slowest"      1 s a step, cancellable         "… pictured"  sends a picture now and then
    "no frames"    what cannot be encoded
    "… black"      nothing but black, where others are noise and large files
    "refuse"       raises on all ranks alike       "memory"  raises what torch does
    "late"         says that it is done, in the epoch before
    "bereaved F"   rank 1 is killed at step 2, and rank 0 fails as soon as it is, as gloo does; F is
                   a file that it makes
    "garbage once F", "half once F"  what is no message, half a message and an exit; F as above
    anything else  0.002 s a step
"""

import fcntl
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mochi_app.engine import rank
from mochi_app.engine.checkpoint import CheckpointWriter, of_request
from mochi_app.messages import Configure, Done, Latent, Message, Resumed, Run, Stage, Step, encode

Emit = Callable[[Message], None]


@dataclass
class FakeResult:
    frames: np.ndarray | None
    seconds: dict[str, float]
    latents_hash: str
    frames_hash: str


class FakeEngine:
    def __init__(self, rank: int = 0, epoch: int = 0) -> None:
        self.rank = rank
        self.epoch = epoch
        self.device = "fake"
        self.versions = {"fake": "1"}

    def free(self) -> None:
        pass

    def run(self, request: Run, emit: Emit, cancelled: Callable[[], bool]) -> FakeResult | None:
        emit(Stage(job_id=request.job_id, stage="denoise"))
        pause = pause_of(request.prompt)
        began = time.perf_counter()
        checkpoints = checkpoints_of(request)
        kept = checkpoints.resume((1,)) if checkpoints else None
        first = kept.step if kept else 0
        if first:
            emit(Resumed(job_id=request.job_id, step=first))
        for step in range(first + 1, request.num_inference_steps + 1):
            if cancelled():
                return None
            if step == 2:
                misbehave(request.prompt)
                bereave(request.prompt, self.rank)
                babble(request, self.epoch)
            kill_at(request.prompt, step, step - first)
            time.sleep(pause)
            if checkpoints:
                checkpoints.settle()
            emit(
                Step(
                    job_id=request.job_id,
                    step=step,
                    steps=request.num_inference_steps,
                    seconds=pause,
                )
            )
            if (
                "pictured" in request.prompt and step % 14 == 1
            ):  # as often as the model's, when slow
                image = "data:image/webp;base64," + f"{step:04d}" * 1000
                emit(Latent(job_id=request.job_id, step=step, image=image))
            if checkpoints and checkpoints.due(step) and step < request.num_inference_steps:
                checkpoints.keep(step, np.array([step], np.float32))
        emit(Stage(job_id=request.job_id, stage="decode"))
        shape = (request.num_frames, request.height, request.width, 3)
        frames = np.random.default_rng(request.seed).integers(0, 255, shape, dtype=np.uint8)
        if request.prompt.endswith("black"):
            frames[:] = 0
        if request.prompt == "no frames":
            frames = frames[:, :, :, :1]
        return FakeResult(
            None if self.rank else frames,
            {"text": 0.001, "denoise": time.perf_counter() - began, "decode": 0.001},
            hashlib.sha256(str(request.seed).encode()).hexdigest(),
            hashlib.sha256(frames.tobytes()).hexdigest(),
        )


def checkpoints_of(request: Run) -> CheckpointWriter | None:
    """Real checkpoints of the faked run."""
    if not request.checkpoint or not request.checkpoint_steps:
        return None
    return CheckpointWriter(Path(request.checkpoint), request.checkpoint_steps, of_request(request))


def pause_of(prompt: str) -> float:
    """Seconds a step takes."""
    match prompt.split():
        case ["slow", *_]:
            return 0.05
        case ["slowest", *_]:
            return 1.0
        case ["kill", "at" | "on", _]:
            return 0.01
    return 0.002


def kill_at(prompt: str, step: int, done: int) -> None:
    match prompt.split():
        case ["kill", "at", number] if step == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        case ["kill", "on", number] if done == int(number):
            os.kill(os.getpid(), signal.SIGKILL)


class Refusal(ValueError):
    settled = True


def misbehave(prompt: str) -> None:
    match prompt.split(maxsplit=2):
        case ["fail", *_]:
            raise ValueError("asked to fail")
        case ["refuse", *_]:
            raise Refusal("no rank can do this")
        case ["poison", *_]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case ["memory", *_]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        case ["hang", *_]:
            time.sleep(3600)
        case ["kill", "once", flag]:
            if not Path(flag).exists():
                Path(flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case ["fell", flag]:
            while not Path(flag).exists():
                time.sleep(0.002)
            os.kill(os.getppid(), signal.SIGKILL)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["stop", *_]:
            os.kill(os.getpid(), signal.SIGSTOP)


def bereave(prompt: str, rank: int) -> None:
    """A lock that the kernel frees as rank 1 ends stands for the connection that rank 0 loses."""
    match prompt.split(maxsplit=1):
        case ["bereaved", path] if rank == 1:
            held = os.open(f"{path}.new", os.O_CREAT | os.O_RDWR)
            fcntl.flock(held, fcntl.LOCK_EX)
            os.rename(f"{path}.new", path)
            os.kill(os.getpid(), signal.SIGKILL)
        case ["bereaved", path]:
            while not Path(path).exists():
                time.sleep(0.002)
            fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)
            raise RuntimeError("Read error: Connection reset by peer")


def babble(request: Run, epoch: int) -> None:
    """Write to the channel past the process's own voice."""
    channel = int(sys.argv[3])
    match request.prompt.split(maxsplit=2):
        case ["late", *_]:
            done = Done(
                epoch=epoch - 1, job_id=request.job_id, video="none.mp4", poster="none.webp",
                seconds={}, latents_hash="", frames_hash="",
            )  # fmt: skip
            os.write(channel, encode(done))
        case [what, "once", flag] if what in ("garbage", "half") and not Path(flag).exists():
            Path(flag).touch()
            os.write(channel, b"{not json}\n" if what == "garbage" else b'{"type":"Done","epo')
            if what == "half":
                os._exit(0)


def load(config: Configure, emit: Emit) -> FakeEngine:
    match sys.argv[1].split("=", 1):
        case ["fails"]:
            raise OSError("weights are truncated")
        case ["exits"]:
            os._exit(7)
        case ["fails-unless", flag] if not Path(flag).exists():
            raise OSError("weights are missing")
        case ["never"]:
            time.sleep(3600)
        case ["garbage"]:
            os.write(int(sys.argv[3]), b"{not json}\n")
    return FakeEngine(config.rank, config.epoch)


if __name__ == "__main__":
    if sys.argv[1] == "import-error":
        raise ImportError("no module named libcudart")
    sys.exit(rank.main(sys.argv[2:], load))
