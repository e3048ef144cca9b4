"""A real rank process with a model that is faked: `python -m tests.engines.fake BEHAVIOUR`.

The behaviour says how it loads; the prompt says how a job goes:
    "slow"         0.05 s a step, cancellable      "fail"    raises
    "hang"         never ends, heartbeat goes on   "poison"  raises a CUDA error
    "kill"         SIGKILL to itself at step 2     "stop"    SIGSTOP to itself at step 2
    "kill once F"  as "kill", unless the file F exists, which it makes
    "no frames"    what cannot be encoded
    "refuse"       raises on all ranks alike       "memory"  raises what torch does
    "late"         says that it is done, in the epoch before
    "garbage once F", "half once F"  what is no message, half a message and an exit; F as above
    anything else  0.002 s a step
"""

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
from mochi_app.engine.messages import Configure, Done, Message, Run, Stage, Step, encode

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
        pause = 0.05 if request.prompt.startswith("slow") else 0.002
        began = time.perf_counter()
        for step in range(1, request.num_inference_steps + 1):
            if cancelled():
                return None
            if step == 2:
                misbehave(request.prompt)
                babble(request, self.epoch)
            time.sleep(pause)
            emit(
                Step(
                    job_id=request.job_id,
                    step=step,
                    steps=request.num_inference_steps,
                    seconds=pause,
                )
            )
        emit(Stage(job_id=request.job_id, stage="decode"))
        shape = (request.num_frames, request.height, request.width, 3)
        frames = np.random.default_rng(request.seed).integers(0, 255, shape, dtype=np.uint8)
        if request.prompt == "no frames":
            frames = frames[:, :, :, :1]
        return FakeResult(
            None if self.rank else frames,
            {"text": 0.001, "denoise": time.perf_counter() - began, "decode": 0.001},
            hashlib.sha256(str(request.seed).encode()).hexdigest(),
            hashlib.sha256(frames.tobytes()).hexdigest(),
        )


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
        case ["kill", *_]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["stop", *_]:
            os.kill(os.getpid(), signal.SIGSTOP)


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
