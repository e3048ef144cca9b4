"""The pool: slots that die come back, the others go on, runs belong to nobody who waits."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mochi_app.slots.job_run import JobFailed
from mochi_app.slots.pool import Pool, threads_per_rank
from mochi_app.slots.slot import Slot, SlotState
from tests.conftest import DEADLINE, alive, eventually, quick_settings
from tests.runs import request

MakePool = Callable[..., Awaitable[Pool]]


def state(pool: Pool, slot: int = 0) -> str:
    return str(pool.slots[slot].describe()["state"])


async def test_slots_come_up_by_themselves(make_pool: MakePool) -> None:
    pool = await make_pool(slots="cpu;cpu")
    assert pool.ready_slot() is None
    await eventually(lambda: pool.ready_or_busy == 2)
    assert pool.ready_slot() is pool.slots[0]


async def test_a_leased_slot_is_not_given_twice(make_pool: MakePool) -> None:
    pool = await make_pool(slots="cpu;cpu")
    await eventually(lambda: pool.ready_or_busy == 2)
    gate = asyncio.Event()

    async def work(slot: Slot) -> bool:
        await gate.wait()
        return True

    first = pool.run(pool.slots[0], work)
    assert pool.ready_slot() is pool.slots[1]
    second = pool.run(pool.slots[1], work)
    assert pool.ready_slot() is None
    gate.set()
    await asyncio.gather(first, second)
    assert pool.ready_slot() is pool.slots[0]


async def test_a_dead_slot_restarts_and_its_neighbour_does_not_notice(make_pool: MakePool) -> None:
    pool = await make_pool(slots="cpu;cpu")
    await eventually(lambda: pool.ready_or_busy == 2)
    dead, neighbour = (slot.slot.pids[0] for slot in pool.slots)
    os.kill(dead, signal.SIGKILL)
    await eventually(lambda: pool.slots[0].restarts == 1)
    assert pool.slots[1].slot.state is SlotState.READY
    await eventually(lambda: pool.ready_or_busy == 2)
    assert pool.slots[0].slot.pids != [dead]
    assert pool.slots[1].slot.pids == [neighbour]
    assert not alive(dead)


async def test_a_slot_that_never_comes_up_is_broken_with_its_cause(
    make_pool: MakePool, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    pool = await make_pool(f"fails-unless={weights}", broken_after=2)
    await eventually(lambda: state(pool) == "broken")
    described = pool.slots[0].describe()
    assert "weights are missing" in described["detail"]
    assert described["retry_seconds"] <= 0.4
    weights.touch()  # and it is tried again, so that no restart of the server is needed
    await eventually(lambda: state(pool) == "ready")


async def test_a_group_on_which_no_job_succeeds_is_broken(make_pool: MakePool) -> None:
    pool = await make_pool(slots="cpu*2", broken_after=2, restart_backoff_max=60)
    supervised = pool.slots[0]
    names = map(str, itertools.count())

    async def fail_once(prompt: str) -> None:
        await eventually(lambda: supervised.ready)

        async def work(slot: Slot) -> bool:
            with pytest.raises(JobFailed):
                await slot.run(request(prompt, next(names)), lambda event: None)
            return not slot.dying

        restarts = supervised.restarts
        await pool.run(supervised, work)
        if prompt == "fail":
            await eventually(lambda: supervised.restarts > restarts)

    await fail_once("fail")
    assert supervised.deaths == 0  # the job's error, as far as one can tell
    await fail_once("refuse")  # all ranks alike: the slot stands
    await fail_once("fail")
    assert supervised.deaths == 0
    await fail_once("fail")
    await fail_once("fail")
    assert (supervised.deaths, supervised.broken) == (2, True)


async def test_backoff_doubles_and_is_bounded(make_pool: MakePool) -> None:
    pool = await make_pool(restart_backoff=1, restart_backoff_max=5, broken_after=10)
    supervised = pool.slots[0]
    waits = []
    for supervised.deaths in (1, 2, 3, 4, 9):
        waits.append(pool._backoff(supervised))
    assert waits == [1, 2, 4, 5, 5]


async def test_a_run_goes_on_when_its_waiter_is_cancelled(make_pool: MakePool) -> None:
    pool = await make_pool()
    await eventually(lambda: pool.ready_or_busy == 1)
    gate, ended = asyncio.Event(), asyncio.Event()

    async def work(slot: Slot) -> bool:
        await gate.wait()
        ended.set()
        return True

    async def waiter() -> None:
        await asyncio.shield(pool.run(pool.slots[0], work))

    task = asyncio.create_task(waiter())
    await eventually(lambda: pool.slots[0].leased)
    task.cancel()
    gate.set()
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_run_that_breaks_does_not_keep_the_lease(make_pool: MakePool) -> None:
    pool = await make_pool()
    await eventually(lambda: pool.ready_or_busy == 1)

    async def work(slot: Slot) -> bool:
        raise ZeroDivisionError

    await pool.run(pool.slots[0], work)
    assert not pool.slots[0].leased
    await eventually(lambda: pool.ready_slot() is not None)


async def test_stop_ends_every_process_also_while_loading(make_pool: MakePool) -> None:
    pool = await make_pool("never", slots="cpu;cpu")
    await eventually(lambda: all(state(pool, i) == "loading" for i in (0, 1)))
    pids = [pid for slot in pool.slots for pid in slot.slot.pids]
    async with asyncio.timeout(DEADLINE):
        await pool.stop(1)
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert pool.ready_slot() is None


@pytest.mark.parametrize(("slots", "threads", "expected"), [("cpu", 3, 3), ("0", 0, 0)])
def test_threads_per_rank(slots: str, threads: int, expected: int) -> None:
    assert threads_per_rank(quick_settings(slots=slots, threads=threads)) == expected


def test_cpu_slots_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(quick_settings(slots="cpu")) == cores
    assert threads_per_rank(quick_settings(slots="cpu;cpu")) == max(1, cores // 2)


async def test_a_dying_slot_takes_no_job(make_pool: MakePool) -> None:
    pool = await make_pool()
    await eventually(lambda: pool.ready_or_busy == 1)
    pool.slots[0].slot.kill("asked to")
    assert pool.slots[0].slot.state is SlotState.READY  # its processes are not reaped yet
    assert pool.ready_slot() is None
    await eventually(lambda: pool.ready_slot() is not None)
