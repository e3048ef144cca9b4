"""The child process, as its parent sees it: real children on a real socketpair."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mochi_app.engine.encode import MAX_COMMENT_BYTES, EncodeError
from mochi_app.engine.rank import disk_full
from mochi_app.jobs import JobIds
from mochi_app.messages import (
    MAX_LINE_BYTES,
    Cancel,
    Cancelled,
    Configure,
    Done,
    Failed,
    Heartbeat,
    Loading,
    Message,
    Ready,
    Run,
    Shutdown,
    Stage,
    Step,
    decode,
    encode,
)
from tests.children import EPOCH, Child
from tests.places import ROOT

IDS = JobIds()

FAKE_MODEL = '''
import hashlib, sys, time
import numpy as np
from types import SimpleNamespace
from mochi_app.engine import rank
from mochi_app.messages import Stage, Step


class AcceleratorError(RuntimeError):
    pass


class Engine:
    """Does what the prompt says."""

    device, versions = "fake", {}

    def run(self, request, emit, cancelled):
        if cancelled():
            return None
        word, _, rest = request.prompt.partition(" ")
        emit(Stage(job_id=request.job_id, stage="text"))
        if word == "file":
            open(rest)
        if word == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        if word == "cuda":
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        if word == "print":
            print(rest)
        if word == "wait":
            for step in range(1, 2000):
                emit(Step(job_id=request.job_id, step=step, steps=2000, seconds=0.01))
                if cancelled():
                    return None
                time.sleep(0.01)
        frames = np.zeros((7, 64, 64, 3), np.uint8)
        return SimpleNamespace(frames=frames, seconds={}, latents_hash="0", frames_hash="0")

    def free(self):
        print("memory freed", file=sys.stderr)


sys.exit(rank.main(loader=lambda config, emit: Engine()))
'''


def request(prompt: str = "a red ball rolls right", steps: int = 2, seed: int = 11) -> Run:
    return Run(
        job_id=IDS.draw(), prompt=prompt, negative_prompt="", seed=seed, num_inference_steps=steps,
        guidance_scale=3.0, height=64, width=64, num_frames=7, fps=12, metadata={"seed": seed},
    )  # fmt: skip


@pytest.fixture(scope="module")
def mochi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Child, list[Message]]]:
    """A child with the embedded model, and what it said while it started."""
    child = Child(["-m", "mochi_app.engine.rank"], tmp_path_factory.mktemp("mochi"))
    try:
        yield child, child.start()
    finally:
        child.kill()


@pytest.fixture(scope="module")
def usual(mochi: tuple[Child, list[Message]]) -> Done:
    """How the usual request ends on a fresh child."""
    return mochi[0].done(request())


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake_model.py"
    script.write_text(FAKE_MODEL)
    return [str(script)]


@pytest.fixture
def fake(program: list[str], tmp_path: Path) -> Iterator[Child]:
    """A child whose model does what the prompt says."""
    child = Child(program, tmp_path)
    try:
        child.start()
        yield child
    finally:
        child.kill()


def test_it_tells_how_the_start_goes(mochi: tuple[Child, list[Message]]) -> None:
    _, events = mochi
    told = [event for event in events if not isinstance(event, Heartbeat)]
    assert [event.what for event in told if isinstance(event, Loading)] == [
        "importing", "loading weights", "warming up",
    ]  # fmt: skip
    ready = told[-1]
    assert isinstance(ready, Ready)
    assert ready.device == "cpu"
    assert ready.seconds > 0
    assert set(ready.versions) == {"torch", "diffusers", "transformers"}


def test_it_beats_before_the_heavy_imports_are_done(mochi: tuple[Child, list[Message]]) -> None:
    _, events = mochi
    imported = events.index(Loading(epoch=EPOCH, what="loading weights"))
    assert any(isinstance(event, Heartbeat) for event in events[:imported])


def test_a_job_walks_through_its_stages(mochi: tuple[Child, list[Message]]) -> None:
    child, _ = mochi
    job = request(steps=3)
    child.send(job)
    events = child.outcome(job)
    told = [e.stage if isinstance(e, Stage) else type(e).__name__ for e in events]
    told = [name for name in told if name != "Latent"]
    stages = ["text", "denoise", "Step", "Step", "Step", "decode", "Tiles", "Tiles", "encode"]
    assert told == [*stages, "Done"]
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.step, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    done = events[-1]
    assert isinstance(done, Done)
    assert list(done.seconds) == ["text", "denoise", "decode", "encode"]
    assert sum(step.seconds for step in steps) <= done.seconds["denoise"]
    names = {path.name for path in child.scratch.iterdir()}
    assert {done.video, done.poster} == {f"{job.job_id}.mp4", f"{job.job_id}.webp"} <= names
    assert not [name for name in names if name.startswith("tmp-")]


def test_the_same_request_twice_gives_the_same_frames(
    mochi: tuple[Child, list[Message]], usual: Done
) -> None:
    child, _ = mochi
    assert child.done(request()).frames_hash == usual.frames_hash
    assert child.done(request(seed=12)).frames_hash != usual.frames_hash


def test_preview_and_enhance_start_from_the_same_latents(
    mochi: tuple[Child, list[Message]], usual: Done
) -> None:
    child, _ = mochi
    enhance = child.done(request(steps=8))
    assert enhance.latents_hash == usual.latents_hash
    assert enhance.frames_hash != usual.frames_hash
    assert child.done(request(seed=12)).latents_hash != usual.latents_hash


def test_a_cancel_takes_effect_at_the_next_step(
    mochi: tuple[Child, list[Message]], usual: Done
) -> None:
    child, _ = mochi
    job = request(steps=512)
    child.send(job)
    child.until(lambda item: isinstance(item, Step) and item.step == 3)
    child.send(Cancel(job_id=job.job_id))
    events = child.outcome(job)
    assert isinstance(events[-1], Cancelled)
    assert not [event for event in events if isinstance(event, Stage)]
    assert child.done(request()).frames_hash == usual.frames_hash


def test_a_job_cancelled_in_the_queue_never_begins(fake: Child) -> None:
    running, waiting = request("wait"), request("go")
    fake.send(running, waiting, Cancel(job_id=waiting.job_id), Cancel(job_id=running.job_id))
    assert isinstance(fake.outcome(running)[-1], Cancelled)
    assert [type(event) for event in fake.outcome(waiting)] == [Cancelled]


def test_a_cancel_that_comes_too_late_means_nothing(fake: Child) -> None:
    job = request("go")
    fake.done(job)
    fake.send(Cancel(job_id=job.job_id))
    fake.done(job)


def test_an_exception_fails_the_job_and_nothing_else(fake: Child) -> None:
    job = request("file /srv/weights/private/model.bin")
    failed = fake.do(job)
    assert isinstance(failed, Failed)
    assert failed.error == ("FileNotFoundError: [Errno 2] No such file or directory: 'model.bin'")
    assert not failed.poisoned
    assert f"job {job.job_id} failed\nTraceback" in fake.stderr()
    assert "memory freed" in fake.stderr()
    fake.done(request("go"))


def test_running_out_of_memory_advises_a_smaller_video(fake: Child) -> None:
    failed = fake.do(request("memory"))
    assert isinstance(failed, Failed)
    assert "64x64" in failed.error
    assert "fewer frames" in failed.error
    assert not failed.poisoned


def test_what_cannot_be_written_fails_on_all_ranks_alike(fake: Child) -> None:
    failed = fake.do(replace(request("go"), metadata={"note": "x" * 2 * MAX_COMMENT_BYTES}))
    assert isinstance(failed, Failed)
    assert "at most" in failed.error
    assert failed.settled


def test_a_broken_device_poisons_the_process(fake: Child) -> None:
    failed = fake.do(request("cuda"))
    assert isinstance(failed, Failed)
    assert failed.poisoned


def test_what_a_library_prints_goes_to_the_log(fake: Child) -> None:
    fake.done(request("print noise from a library"))
    fake.send(Shutdown())
    assert fake.process.wait(10) == 0
    assert "noise from a library" in fake.stderr()


def test_shutdown_waits_for_the_job_that_runs(fake: Child) -> None:
    job = request("go")
    fake.send(job, Shutdown())
    assert isinstance(fake.outcome(job)[-1], Done)
    assert fake.process.wait(10) == 0


@pytest.mark.parametrize("prompt", ["go", "wait"], ids=["idle", "busy"])
def test_the_end_of_commands_ends_it_at_once(fake: Child, prompt: str) -> None:
    """Only the parent's writing ends here: what the child sends still finds a reader."""
    fake.send(request(prompt))
    fake.until(lambda item: isinstance(item, Step if prompt == "wait" else Done))
    fake.socket.shutdown(socket.SHUT_WR)
    assert fake.process.wait(5) == 0


def test_it_ends_when_nobody_reads_what_it_sends(fake: Child) -> None:
    fake.socket.shutdown(socket.SHUT_RD)
    assert fake.process.wait(5) == 0


def test_it_dies_with_its_parent_even_if_the_channel_stays_open(
    program: list[str], tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, *sys.argv[2:], '--channel', sys.argv[1]],"
        " pass_fds=[int(sys.argv[1])], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with theirs:
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno()), *program],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        config = Configure(
            slot=0, rank=0, world_size=1, model="", device="cpu", dtype="auto", scratch=""
        )
        ours.settimeout(30)
        ours.sendall(encode(config))
        lines = ours.makefile("rb")
        while not isinstance(decode(next(lines)), Ready):
            pass
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
        deadline = time.monotonic() + 5
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        gone = not alive(pid)
        if not gone:
            os.kill(pid, signal.SIGKILL)
    lines.close()
    ours.close()
    assert gone


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_terminal_interrupt_is_the_parents_affair(fake: Child) -> None:
    fake.process.send_signal(signal.SIGINT)
    fake.done(request("go"))


@pytest.mark.parametrize(
    "line",
    [b"garbage\n", b'{"type":"Heartbeat","epoch":7}\n', b"x" * (MAX_LINE_BYTES + 1)],
    ids=["garbage", "not a command", "endless line"],
)
def test_a_parent_that_talks_nonsense_ends_it(fake: Child, line: bytes) -> None:
    fake.socket.sendall(line)
    assert fake.process.wait(10) == 3
    assert any(line.startswith("channel: ") for line in fake.stderr().splitlines())


def test_a_model_that_does_not_load_is_one_line_and_a_status(tmp_path: Path) -> None:
    child = Child(["-m", "mochi_app.engine.rank"], tmp_path, model=str(tmp_path / "no-model"))
    try:
        child.send(child.config)
        said = [event for event in child.events() if not isinstance(event, Heartbeat)]
        assert [event for event in said if isinstance(event, Ready)] == []
        assert child.process.wait(20) == 1
        lines = child.stderr().strip().splitlines()
        assert "no-model: expected a MochiPipeline folder" in lines[-1]
        assert not any("Traceback" in line for line in lines)
    finally:
        child.kill()


def test_the_first_message_must_configure(program: list[str], tmp_path: Path) -> None:
    child = Child(program, tmp_path)
    try:
        child.send(request("go"))
        assert child.process.wait(20) == 1
        assert "expected Configure" in child.stderr()
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "whatever it says"), True),
        (OSError(errno.EDQUOT, "whatever it says"), True),
        (OSError(errno.EACCES, "No space left on device"), False),
        (EncodeError("ffmpeg ended with status 228: x.mp4: No space left on device"), True),
        (EncodeError("ffmpeg ended with status 1: Invalid argument"), False),
    ],
)
def test_a_full_disk_is_told_from_other_failures(error: Exception, full: bool) -> None:
    assert disk_full(error) is full
