"""Harms to runs that are under way, and to the checkpoints that they go on from."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alive
from tests.serving import Served, poll

Serve = Callable[..., Served]
EVERY = 8  # steps between checkpoints, the default
SMALL = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 64}
QUICK = {"MOCHI_THREADS": "1", "MOCHI_RESTART_BACKOFF": "0.1", "MOCHI_RESTART_BACKOFF_MAX": "0.4"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of two slots with the embedded model, for the cases that leave it whole."""
    served = Served(tmp_path_factory.mktemp("shared") / "data", **QUICK, MOCHI_SLOTS="cpu;cpu")
    yield served.start().ready()
    served.end()


def ask(served: Served, **parameters: Any) -> str:
    """A job of 64 short steps."""
    job = served.call("submit_job", **({"prompt": "a red ball", "seed": 7} | SMALL | parameters))
    return str(job["id"])


def undisturbed(served: Served, **parameters: Any) -> str:
    """Hash of the frames of such a job that nothing happens to."""
    ended = served.ended(ask(served, **parameters))
    assert (ended["status"], ended["resumed_step"]) == ("COMPLETED", 0), ended
    return str(ended["hashes"]["frames"])


def checkpoint(served: Served, job_id: str) -> Path:
    return served.data_dir / "checkpoints" / job_id / "latents.safetensors"


def killed_after(served: Served, job_id: str, step: int) -> int:
    """Kill the job's rank after `step` or a little later; returns the last step that was told.

    It is stopped (SIGSTOP) before, until all that it said has been heard.
    """
    served.running(job_id, step)
    (pid,) = served.slots()[served.job(job_id)["slot"]]["pids"]
    os.kill(pid, signal.SIGSTOP)
    poll(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "T")
    seen: list[int] = []

    def settled() -> bool:
        seen.append(served.job(job_id)["step"])
        return seen[-3:] == [seen[-1]] * 3

    poll(settled, "the last step")
    assert seen[-1] < 64, "the job was over before it was met"
    os.kill(pid, signal.SIGKILL)
    return seen[-1]


def killed_in_the_middle(served: Served, job_id: str, step: int = EVERY + 2) -> None:
    """Kill the server (SIGKILL) when the job has a checkpoint; its ranks are gone afterwards."""
    served.running(job_id, step)
    pids = served.pids()
    assert checkpoint(served, job_id).exists()
    served.kill()
    poll(lambda: not any(map(alive, pids)), "the end of the ranks")


def gone(served: Served, job_id: str) -> None:
    poll(lambda: not checkpoint(served, job_id).parent.exists(), "the end of the checkpoint")


def said(served: Served, text: str) -> bool:
    return text in served.log.read_text()


def test_a_rank_killed_at_any_step_of_64(shared: Served) -> None:
    """A rank is killed (SIGKILL) at any of 64 steps: its job resumes on any slot with the same
    layout, at most 8 steps are repeated, and the frames are those of an undisturbed run."""
    expected = undisturbed(shared)
    for step in (3, 20, 40):
        poll(lambda: len(shared.pids()) == 2, "both slots")
        job_id = ask(shared)
        last = killed_after(shared, job_id, step)
        ended = shared.ended(job_id)
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 2)
        assert last - EVERY <= ended["resumed_step"] <= last
        assert ended["resumed_step"] == last // EVERY * EVERY or last % EVERY == 0
        assert ended["hashes"]["frames"] == expected
        gone(shared, job_id)


def test_a_disk_that_takes_no_checkpoint(shared: Served) -> None:
    """The disk accepts no checkpoints: the job is made without them."""
    expected = undisturbed(shared)
    folder = shared.data_dir / "checkpoints"
    folder.rmdir()
    folder.touch()
    try:
        assert undisturbed(shared) == expected
        assert said(shared, "no checkpoint was left: Not a directory")
    finally:
        folder.unlink()
        folder.mkdir()


def test_the_server_killed_in_mid_run(serve: Serve) -> None:
    """The server is killed (SIGKILL) or stopped (SIGTERM) in mid-run: the job resumes from its
    checkpoint, makes the same frames, and no attempt is counted."""
    served = serve(**QUICK, MOCHI_DRAIN_SECONDS="0.1").ready()
    expected = undisturbed(served)
    job_id = ask(served)
    killed_in_the_middle(served, job_id, step=20)
    served.start()
    served.running(job_id, step=35)
    assert served.job(job_id)["resumed_step"] in (16, 24)
    served.terminate()
    served.start()
    ended = served.ended(job_id)
    assert (ended["status"], ended["attempts"], list(ended["deaths"])) == ("COMPLETED", 1, [])
    assert ended["resumed_step"] >= 32
    assert ended["hashes"]["frames"] == expected
    gone(served, job_id)


def test_torn_and_foreign_checkpoints(serve: Serve) -> None:
    """A checkpoint is truncated, or belongs to another job: it is removed, and the job starts over
    and makes the frames of an undisturbed run."""
    served = serve(**QUICK, MOCHI_SLOTS="cpu;cpu").ready()
    expected = [undisturbed(served, seed=seed) for seed in (7, 8)]
    torn, foreign = ask(served, seed=7), ask(served, seed=8)
    served.running(torn, EVERY + 2)
    killed_in_the_middle(served, foreign)
    shutil.copyfile(checkpoint(served, torn), checkpoint(served, foreign))
    os.truncate(checkpoint(served, torn), 1000)
    stray = served.data_dir / "checkpoints" / ("0" * 14 + "-" + "0" * 16)
    stray.mkdir()
    served.start()
    for job_id, frames in zip((torn, foreign), expected, strict=True):
        ended = served.ended(job_id)
        assert (ended["status"], ended["resumed_step"]) == ("COMPLETED", 0)
        assert ended["hashes"]["frames"] == frames
        assert said(served, f"job {job_id}: its checkpoint is not used")
        gone(served, job_id)
    assert said(served, "its checkpoint is not used: of another job_id, seed")
    assert not stray.exists()


def test_a_checkpoint_of_another_layout_and_of_other_options(serve: Serve) -> None:
    """The server comes back with another slot layout or other options: the old checkpoint is
    removed, and the job starts over."""
    served = serve(**QUICK, MOCHI_DTYPE="bfloat16").ready()
    job_id = ask(served)
    killed_in_the_middle(served, job_id)
    served = serve(**QUICK)
    killed_in_the_middle(served, job_id)
    assert said(served, "its checkpoint is not used: of another transformer type, vae type")
    served = serve(**QUICK, MOCHI_SLOTS="cpu*2")
    ended = served.ended(job_id)
    assert (ended["status"], ended["resumed_step"], ended["attempts"]) == ("COMPLETED", 0, 1)
    assert said(served, "its checkpoint is not used: of another layout, world_size")
    assert ended["hashes"]["frames"] == undisturbed(served)


def test_a_poison_job(serve: Serve) -> None:
    """Two slots die of a job without a new checkpoint in between, with a server restart between the
    deaths: the job fails and says where and why; the others are made."""
    served = serve("ok", **QUICK | {"MOCHI_RESTART_BACKOFF_MAX": "600"}, MOCHI_SLOTS="cpu;cpu")
    served.ready()
    before = served.call("submit_job", prompt="slow", num_inference_steps=40)
    bad = served.call("submit_job", prompt="kill at 20", num_inference_steps=40)
    poll(lambda: served.job(bad["id"])["deaths"], "the first death")
    neighbour = served.ended(before["id"])
    assert (neighbour["status"], neighbour["attempts"]) == ("COMPLETED", 1)
    served.kill()
    served.start()
    after = served.call("submit_job", prompt="p")
    ended = served.ended(bad["id"])
    assert ended["status"] == "FAILED"
    assert ended["error"].startswith("poison: 2 slots died of it and it came no further")
    assert ended["error"].count("at step 19 of 40: rank 0") == 2
    assert served.ended(after["id"])["status"] == "COMPLETED"
    gone(served, bad["id"])


def test_a_job_that_dies_again_and_again_but_comes_further(serve: Serve) -> None:
    """A rank dies again and again, each time after a new checkpoint: the job is made."""
    served = serve("ok", **QUICK).ready()
    job = served.call("submit_job", prompt=f"kill on {EVERY + 2}", num_inference_steps=32)
    ended = served.ended(job["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 4)
    assert ended["resumed_step"] == 24
