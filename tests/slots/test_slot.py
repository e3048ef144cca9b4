"""One slot and its real child processes: every way to start, run, stop and die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mochi_app import child_process, messages
from mochi_app.messages import JobEvent
from mochi_app.setting_types import Timeouts
from mochi_app.slots import rank_process
from mochi_app.slots import slot as slot_module
from mochi_app.slots.job_run import JobCancelled, JobFailed
from mochi_app.slots.slot import Slot, SlotDied, SlotState
from tests.conftest import alive, eventually
from tests.runs import request

MakeSlot = Callable[..., Slot]


def ignore(event: JobEvent) -> None:
    pass


async def test_start_goes_through_its_states_to_ready(make_slot: MakeSlot) -> None:
    slot = make_slot()
    states: list[SlotState] = []
    slot._on_change = lambda: states.append(slot.state)
    await slot.start()
    assert states[0] is SlotState.STARTING
    assert SlotState.LOADING in states
    assert slot.state is SlotState.READY
    assert all(alive(pid) for pid in slot.pids)


async def test_a_rank_leads_its_own_session(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    assert os.getsid(slot.pids[0]) == slot.pids[0]


async def test_a_run_reports_steps_in_order_and_leaves_its_files(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    events: list[JobEvent] = []
    done = await slot.run(request(), events.append)
    steps = [event.step for event in events if isinstance(event, messages.Step)]
    assert steps == [1, 2, 3, 4]
    stages = [event.stage for event in events if isinstance(event, messages.Stage)]
    assert stages == ["denoise", "decode", "encode"]
    assert (slot.scratch / done.video).is_file()
    assert (slot.scratch / done.poster).is_file()
    assert slot.state is SlotState.READY


async def test_one_process_serves_job_after_job(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    pids = slot.pids
    for job_id in ("one", "two", "three"):
        assert (await slot.run(request(job_id=job_id), ignore)).job_id == job_id
    assert slot.pids == pids


async def test_cancel_stops_at_a_step_and_keeps_the_process(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    pids = slot.pids
    steps: list[int] = []

    def hear(event: JobEvent) -> None:
        if isinstance(event, messages.Step):
            steps.append(event.step)
            if event.step == 3:
                slot.cancel("job")

    with pytest.raises(JobCancelled):
        await slot.run(request("slow", steps=200), hear)
    assert steps[-1] < 10
    assert slot.state is SlotState.READY
    assert slot.pids == pids
    assert (await slot.run(request(job_id="next"), ignore)).job_id == "next"


async def test_cancel_of_another_job_is_ignored(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    task = asyncio.create_task(slot.run(request("slow", steps=5), ignore))
    await eventually(lambda: slot.job_id == "job")
    slot.cancel("somebody-else")
    assert (await task).job_id == "job"


async def test_a_cancel_that_is_not_heard_kills_the_slot(make_slot: MakeSlot) -> None:
    slot = make_slot(cancel_timeout=0.3)
    await slot.start()
    events: list[JobEvent] = []
    task = asyncio.create_task(slot.run(request("hang"), events.append))
    await eventually(lambda: any(isinstance(event, messages.Step) for event in events))
    slot.cancel("job")
    with pytest.raises(JobCancelled):
        await task
    assert "did not stop" in await slot.died()


async def test_a_failed_job_leaves_the_slot_ready(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    with pytest.raises(JobFailed, match="asked to fail"):
        await slot.run(request("fail"), ignore)
    assert slot.state is SlotState.READY


async def test_a_poisoned_process_is_not_used_again(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    pid = slot.pids[0]
    with pytest.raises(SlotDied, match=r"cannot be used any more: .*CUDA error"):
        await slot.run(request("poison"), ignore)
    await slot.died()
    assert not alive(pid)


async def test_a_killed_process_is_named_with_its_signal(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    pid = slot.pids[0]
    with pytest.raises(SlotDied, match=rf"rank 0 \(pid {pid}\) was killed by SIGKILL"):
        await slot.run(request("kill"), ignore)
    await slot.died()
    assert slot.state is SlotState.DOWN


async def test_an_idle_process_that_dies_is_noticed(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    os.kill(slot.pids[0], signal.SIGTERM)
    assert "SIGTERM" in await asyncio.wait_for(slot.died(), 10)


async def test_a_hang_with_heartbeat_runs_into_the_step_deadline(make_slot: MakeSlot) -> None:
    slot = make_slot(step_timeout=0.5)
    await slot.start()
    with pytest.raises(SlotDied, match=r"no progress within 0\.5 seconds"):
        await slot.run(request("hang"), ignore)


async def test_a_run_can_have_a_deadline_of_its_own(make_slot: MakeSlot) -> None:
    slot = make_slot(step_timeout=60)
    await slot.start()
    with pytest.raises(SlotDied, match=r"no progress within 0\.4 seconds"):
        await slot.run(request("hang"), ignore, Timeouts(step=0.4, cancel=60))
    await slot.died()
    await slot.start()
    events: list[JobEvent] = []
    work = slot.run(request("hang"), events.append, Timeouts(step=60, cancel=0.3))
    run = asyncio.create_task(work)
    await eventually(lambda: any(isinstance(event, messages.Step) for event in events))
    slot.cancel("job")
    with pytest.raises(JobCancelled):
        await run
    assert "did not stop within 0.3 seconds" in await slot.died()


async def test_a_frozen_process_runs_into_the_heartbeat_deadline(make_slot: MakeSlot) -> None:
    slot = make_slot(heartbeat_timeout=2.5)
    await slot.start()
    pid = slot.pids[0]
    with pytest.raises(SlotDied, match=r"no heartbeat for 2\.5 seconds"):
        await slot.run(request("stop"), ignore)
    await slot.died()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("import-error", "exited with code 1: ImportError: no module named libcudart"),
        ("exits", "exited with code 7"),
        ("fails", "weights are truncated"),
        ("garbage", "broke the protocol"),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    make_slot: MakeSlot, behaviour: str, reason: str
) -> None:
    slot = make_slot(behaviour)
    with pytest.raises(SlotDied, match=reason):
        await slot.start()
    assert slot.state is SlotState.DOWN
    assert slot.pids == []


async def test_a_load_that_never_ends_is_given_up(make_slot: MakeSlot) -> None:
    slot = make_slot("never", load_timeout=0.5)
    with pytest.raises(SlotDied, match=r"did not load within 0\.5 seconds"):
        await slot.start()


async def test_a_process_that_never_reports_is_given_up(make_slot: MakeSlot) -> None:
    slot = make_slot(command=(sys.executable, "-m", "tests.engines.silent"), start_timeout=1)
    with pytest.raises(SlotDied, match="did not report within 1 seconds"):
        await slot.start()


async def test_a_command_that_does_not_exist_is_a_death(make_slot: MakeSlot) -> None:
    slot = make_slot(command=("/no/such/engine",))
    with pytest.raises(SlotDied, match="could not be started"):
        await slot.start()
    assert slot.state is SlotState.DOWN


async def test_a_slot_starts_again_with_a_new_epoch(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    first = slot.epoch
    slot.kill("test")
    await slot.died()
    await slot.start()
    assert slot.epoch == first + 1
    assert (await slot.run(request(), ignore)).job_id == "job"


async def test_stop_ends_the_process(make_slot: MakeSlot) -> None:
    slot = make_slot()
    await slot.start()
    pid = slot.pids[0]
    await slot.stop()
    assert not alive(pid)
    assert slot.state is SlotState.DOWN


async def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.conftest import quick_settings, fake_engine\n"
        "from mochi_app.slots.slot import Slot\n"
        "async def main():\n"
        "    settings, scratch = quick_settings(), Path(sys.argv[1])\n"
        "    slot = Slot(0, settings.slots[0], settings, scratch, command=fake_engine())\n"
        "    await slot.start()\n"
        "    print(slot.pids[0], flush=True)\n"
        "    await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert alive(child)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not alive(child), "the orphan's end", 5)


async def test_ranks_of_a_slot_are_one(make_slot: MakeSlot) -> None:
    slot = make_slot(slots="cpu*2")
    await slot.start()
    pids = slot.pids
    assert len(set(pids)) == 2
    assert (await slot.run(request(), ignore)).job_id == "job"
    assert slot.pids == pids
    os.kill(pids[1], signal.SIGKILL)
    assert "rank 1" in await slot.died()
    assert slot.state is SlotState.DOWN
    await eventually(lambda: not any(alive(pid) for pid in pids))
    await slot.start()
    assert not set(slot.pids) & set(pids)


async def test_a_failed_job_of_a_group_costs_no_blame(make_slot: MakeSlot) -> None:
    slot = make_slot(slots="cpu*2")
    await slot.start()
    with pytest.raises(JobFailed, match="asked to fail"):
        await slot.run(request("fail"), ignore)
    assert "start anew" in await slot.died()
    assert slot.blameless
    await slot.start()
    assert not slot.blameless


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("no frames", "."), ("refuse", "no rank can do this")],
    ids=["the others are through", "all refuse alike"],
)
async def test_a_failed_job_that_leaves_no_rank_waiting_costs_a_group_nothing(
    make_slot: MakeSlot, prompt: str, message: str
) -> None:
    slot = make_slot(slots="cpu*2")
    await slot.start()
    pids = slot.pids
    with pytest.raises(JobFailed, match=message):
        await slot.run(request(prompt), ignore)
    assert slot.state is SlotState.READY
    assert slot.pids == pids
    assert (await slot.run(request(job_id="next"), ignore)).job_id == "next"


async def test_the_death_of_a_rank_counts_though_its_status_is_late(
    make_slot: MakeSlot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its channel ends at once, and its peer complains of it, before the kernel has the status."""
    slot = make_slot(slots="cpu*2")
    await slot.start()
    peer, pid = slot.pids
    wait = rank_process.RankProcess.wait

    async def late(rank: rank_process.RankProcess, timeout: float | None = None) -> int | None:
        if timeout == child_process.EXIT_GRACE and rank.rank == 1:
            await eventually(lambda: not alive(peer) or (slot._run and slot._run.outcome.done()))
        return await wait(rank, timeout)

    monkeypatch.setattr(rank_process.RankProcess, "wait", late)
    with pytest.raises(SlotDied, match=rf"rank 1 \(pid {pid}\) was killed by SIGKILL"):
        await slot.run(request(f"bereaved {tmp_path / 'lock'}"), ignore)
    assert slot.dying
    assert "rank 1" in await slot.died()
    assert not slot.blameless


async def test_the_death_of_a_rank_counts_though_its_peers_word_is_read_first(
    make_slot: MakeSlot, tmp_path: Path
) -> None:
    """Both wait to be read where this process was held up."""
    slot = make_slot(slots="cpu*2")
    await slot.start()
    pid = slot.pids[1]

    def hear(event: JobEvent) -> None:
        if isinstance(event, messages.Step):
            hold_up_until_failed(slot)

    with pytest.raises(SlotDied, match=rf"rank 1 \(pid {pid}\) was killed by SIGKILL"):
        await slot.run(request(f"bereaved {tmp_path / 'lock'}"), hear)
    await slot.died()
    assert not slot.blameless


def hold_up_until_failed(slot: Slot) -> None:
    """Block the loop until the first rank's channel has its failure, not read yet."""
    assert slot._ranks[0]._writer is not None
    channel = slot._ranks[0]._writer.get_extra_info("socket")
    limit = time.monotonic() + 20
    with socket.socket(fileno=os.dup(channel.fileno())) as copy:
        while b"Failed" not in peek(copy):
            assert time.monotonic() < limit, "the first rank did not fail"
            time.sleep(0.01)


def peek(channel: socket.socket) -> bytes:
    try:
        return channel.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


async def test_a_rank_lost_just_after_a_failure_explains_it(
    make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_module, "FOLLOW_GRACE", 20.0)
    slot = make_slot(slots="cpu*2")
    await slot.start()
    pid = slot.pids[1]
    run = asyncio.create_task(slot.run(request("fail"), ignore))
    await eventually(lambda: slot._run is not None and slot._run.outcome.done())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SlotDied, match=rf"rank 1 \(pid {pid}\) was killed by SIGKILL"):
        await run
    await slot.died()
    assert not slot.blameless


async def test_the_first_rank_that_is_lost_gives_the_reason(
    make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers are killed for it at once, and leave their status sooner."""
    slot = make_slot(slots="cpu*3")
    await slot.start()
    first, lost, last = slot.pids
    wait = rank_process.RankProcess.wait

    async def late(rank: rank_process.RankProcess, timeout: float | None = None) -> int | None:
        if timeout == child_process.EXIT_GRACE and rank.rank == 1:
            await eventually(lambda: not alive(first) and not alive(last), "the peers' end", 10)
        return await wait(rank, timeout)

    monkeypatch.setattr(rank_process.RankProcess, "wait", late)
    os.kill(lost, signal.SIGKILL)
    assert f"rank 1 (pid {lost}) was killed by SIGKILL" in await slot.died()


async def test_a_slot_whose_processes_go_is_known_at_once(make_slot: MakeSlot) -> None:
    slot = make_slot(slots="cpu*2")
    assert not slot.dying
    await slot.start()
    assert not slot.dying
    slot.kill("asked to")
    assert slot.dying  # before anything is reaped
    await slot.died()
    await slot.start()
    assert not slot.dying
