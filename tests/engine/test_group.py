"""The app with groups of two ranks: any rank lost costs its job one retry and nobody else anything.

The real server, the embedded model, `MOCHI_SLOTS="cpu*2;cpu*2"`, and real kills.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served, poll

PROMPT = "a big red square moving left on a white background"
LONG = 60  # steps: long enough to be met in the middle
SMALL = {"height": 64, "width": 64, "num_frames": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two groups of two CPU ranks each, one thread a rank."""
    served = Served(
        tmp_path_factory.mktemp("groups") / "data",
        MOCHI_SLOTS="cpu*2;cpu*2",
        MOCHI_THREADS="1",
        MOCHI_RESTART_BACKOFF="0.1",
    )
    served.start()
    all_ready(served)
    yield served
    served.end()


def all_ready(server: Served) -> None:
    poll(lambda: [slot["state"] for slot in server.slots()] == ["ready"] * 2, "two ready slots")


def ask(server: Served, seed: int, steps: int = LONG, **more: Any) -> str:
    job = server.call(
        "submit_job", prompt=PROMPT, seed=seed, num_inference_steps=steps, **(SMALL | more)
    )
    return str(job["id"])


def slot_of(server: Served, job_id: str) -> dict[str, Any]:
    """The slot that works on the job, once there is one."""
    return poll(  # type: ignore[no-any-return]
        lambda: next((slot for slot in server.slots() if slot["job_id"] == job_id), None),
        f"a slot for {job_id}",
    )


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_its_job_a_retry_and_nobody_else_anything(
    server: Served, slot: int, rank: int
) -> None:
    all_ready(server)
    jobs = [ask(server, seed) for seed in (1, 2)]
    for job_id in jobs:
        server.running(job_id, step=3)
    slots = server.slots()  # two groups at once
    assert {one["job_id"] for one in slots} == set(jobs)
    hurt, other = slots[slot], slots[1 - slot]
    os.kill(hurt["pids"][rank], signal.SIGKILL)
    ended = {job_id: server.ended(job_id) for job_id in jobs}
    assert ended[other["job_id"]]["status"] == "COMPLETED"
    assert ended[other["job_id"]]["attempts"] == 1
    assert ended[hurt["job_id"]]["status"] == "COMPLETED"
    assert ended[hurt["job_id"]]["attempts"] == 2
    all_ready(server)
    now = server.slots()
    assert now[1 - slot]["pids"] == other["pids"]
    assert not set(now[slot]["pids"]) & set(hurt["pids"])  # the peer went as well
    assert now[slot]["restarts"] == hurt["restarts"] + 1
    # frames do not depend on what happened
    assert ended[jobs[0]]["hashes"] == undisturbed(server, 1)
    assert ended[jobs[1]]["hashes"] == undisturbed(server, 2)


def undisturbed(server: Served, seed: int) -> dict[str, str]:
    """Hashes of the same request when nothing happens, made once."""
    known: dict[int, dict[str, str]] = server.__dict__.setdefault("undisturbed", {})
    if seed not in known:
        known[seed] = server.ended(ask(server, seed))["hashes"]
    return known[seed]


def cancel_at(server: Served, moment: random.Random, seed: int) -> str:
    """Submit, wait for a moment that is different each time, cancel; how the job ended."""
    job_id = ask(server, seed, steps=moment.choice([2, 20, 60]), num_frames=31, width=96, height=96)
    if moment.random() < 0.8:
        slot_of(server, job_id)
        time.sleep(moment.uniform(0, 2.5))
    server.call("cancel_job", job_id=job_id)
    return str(server.ended(job_id)["status"])


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_cancels_at_any_moment_leave_every_slot_as_new(server: Served, count: int) -> None:
    all_ready(server)
    before = [slot["pids"] for slot in server.slots()]
    moment = random.Random(count)
    outcomes = [cancel_at(server, moment, seed) for seed in range(count)]
    assert set(outcomes) <= {"CANCELLED", "COMPLETED"}
    assert "CANCELLED" in outcomes
    all_ready(server)
    assert [slot["pids"] for slot in server.slots()] == before  # none had to be killed
    jobs = [ask(server, 1), ask(server, 1)]  # one for each slot
    assert [server.ended(job_id)["hashes"] for job_id in jobs] == [undisturbed(server, 1)] * 2


def test_a_cancel_while_the_slot_loads(tmp_path: Path) -> None:
    with_one = Served(tmp_path / "data", MOCHI_SLOTS="cpu*2", MOCHI_THREADS="1").start()
    try:
        first, second = ask(with_one, 1, steps=2), ask(with_one, 2, steps=2)
        with_one.call("cancel_job", job_id=first)
        assert with_one.job(first)["status"] == "CANCELLED"
        assert with_one.ended(second)["status"] == "COMPLETED"
    finally:
        with_one.end()
