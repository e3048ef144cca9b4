"""Harms to the rank processes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app.files import PROJECT_DIR
from tests.conftest import alive
from tests.serving import Served, poll

QUICK = {"MOCHI_RESTART_BACKOFF": "0.1", "MOCHI_RESTART_BACKOFF_MAX": "1"}
TINY = PROJECT_DIR / "assets" / "tiny-mochi"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the cases that leave it as it was: two slots, the second of two ranks."""
    settings = QUICK | {
        "MOCHI_SLOTS": "cpu;cpu*2",
        "MOCHI_HEARTBEAT_TIMEOUT": "4",
        "MOCHI_STEP_TIMEOUT": "12",
        "MOCHI_CANCEL_TIMEOUT": "2",
        "MOCHI_BROKEN_AFTER": "100",
        "MOCHI_HEIGHT": "64",
        "MOCHI_WIDTH": "64",
        "MOCHI_NUM_FRAMES": "7",
    }
    program = ("-m", "tests.faults.server", "ok")
    served = Served(tmp_path_factory.mktemp("fleet") / "data", program=program, **settings).start()
    yield served
    served.end()


@pytest.fixture
def ready(fleet: Served) -> Served:
    """The server with both slots ready."""
    poll(lambda: all(slot["state"] == "ready" for slot in fleet.slots()), "two ready slots")
    return fleet


def slot_of(served: Served, job_id: str) -> dict[str, Any]:
    """The slot that runs the job."""
    return next(slot for slot in served.slots() if slot["job_id"] == job_id)


def start(served: Served, prompt: str, steps: int = 60) -> dict[str, Any]:
    """A job that runs, with the slot it runs on."""
    job = served.call("submit_job", prompt=prompt, num_inference_steps=steps)
    served.running(job["id"])
    return slot_of(served, job["id"])


def detail(served: Served) -> str:
    """What the first slot says."""
    return str(served.slots()[0]["detail"])


def refuses_health(served: Served) -> bool:
    """Whether /healthz says that no video can be made."""
    return httpx.get(f"{served.url}/healthz").status_code == 503


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_rank_ends_in_mid_step(ready: Served, how: signal.Signals) -> None:
    """A rank dies in mid-step by SIGKILL, a segmentation fault or an abort: its job is made after
    one retry; the other slot's processes stay, and its job needs no retry."""
    harmed = start(ready, "slow")
    spared = start(ready, "slow")
    assert harmed["slot"] != spared["slot"]
    os.kill(harmed["pids"][-1], how)
    ended = [ready.ended(slot["job_id"]) for slot in (harmed, spared)]
    assert [job["status"] for job in ended] == ["COMPLETED", "COMPLETED"]
    assert [job["attempts"] for job in ended] == [2, 1]
    assert ready.slots()[spared["slot"]]["pids"] == spared["pids"]
    assert f"killed by {how.name}" in ready.log.read_text()
    assert not any(alive(pid) for pid in harmed["pids"])


def test_a_rank_is_frozen(ready: Served) -> None:
    """A rank is frozen (SIGSTOP) in mid-step: it is replaced when its heartbeat fails, and its job
    is made after one retry."""
    slot = start(ready, "slow")
    os.kill(slot["pids"][0], signal.SIGSTOP)
    ended = ready.ended(slot["job_id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 2)
    assert "sent no heartbeat" in ready.log.read_text()
    assert not alive(slot["pids"][0])


def test_a_job_hangs(ready: Served) -> None:
    """A job hangs while its process lives: it is ended at its deadline, retried once, and then
    fails with the cause; other jobs are made meanwhile and afterwards."""
    slot = start(ready, "hang")
    other = ready.call("submit_job", prompt="p")
    assert ready.ended(other["id"])["status"] == "COMPLETED"
    ended = ready.ended(slot["job_id"])
    assert ended["status"] == "FAILED"
    assert "no progress" in ended["error"]
    assert ready.ended(ready.call("submit_job", prompt="p")["id"])["status"] == "COMPLETED"


def test_a_cancel_that_is_not_heard(ready: Served) -> None:
    """A job does not react to its cancel: the slot is killed, the job is CANCELLED, and the device
    takes the next one."""
    slot = start(ready, "hang")
    ready.call("cancel_job", job_id=slot["job_id"])
    assert ready.ended(slot["job_id"])["status"] == "CANCELLED"
    poll(lambda: not any(alive(pid) for pid in slot["pids"]), "the end of the processes")
    assert ready.ended(ready.call("submit_job", prompt="p")["id"])["status"] == "COMPLETED"


@pytest.mark.parametrize("what", ["garbage", "half"])
def test_a_rank_breaks_the_protocol(ready: Served, tmp_path: Path, what: str) -> None:
    """A rank sends garbage, or half a message and nothing more: it is replaced, and its job is made
    after one retry."""
    prompt = f"{what} once {tmp_path / 'flag'}"
    ended = ready.ended(ready.call("submit_job", prompt=prompt)["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 2)


def test_a_message_of_an_earlier_start_arrives(ready: Served) -> None:
    """A message from an earlier start of the slot arrives late: it is ignored."""
    ended = ready.ended(ready.call("submit_job", prompt="late")["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    assert ended["hashes"]["frames"]
    assert httpx.get(f"{ready.url}{ended['video_url']}").status_code == 200


def test_a_video_does_not_fit_the_memory(ready: Served) -> None:
    """A GPU runs out of memory: the job fails with advice, and a slot of one rank keeps running."""
    blocking = start(ready, "slow", 40)  # one slot is taken, whichever it is
    before = {slot["slot"]: slot["pids"] for slot in ready.slots()}
    ended = ready.ended(ready.call("submit_job", prompt="memory")["id"])
    assert ended["status"] == "FAILED"
    assert "smaller size or fewer frames" in ended["error"]
    assert ready.ended(blocking["job_id"])["status"] == "COMPLETED"
    poll(lambda: all(slot["state"] == "ready" for slot in ready.slots()), "two ready slots")
    after = {slot["slot"]: slot["pids"] for slot in ready.slots()}
    assert after[0] == before[0]


def test_a_device_is_poisoned(ready: Served) -> None:
    """A CUDA error leaves a device unusable: its processes are replaced; the job fails after a
    second try, and the next one is made."""
    restarts = sum(slot["restarts"] for slot in ready.slots())
    ended = ready.ended(ready.call("submit_job", prompt="poison")["id"])
    assert ended["status"] == "FAILED"
    assert "illegal memory access" in ended["error"]
    poll(lambda: sum(slot["restarts"] for slot in ready.slots()) >= restarts + 2, "restarts")
    assert ready.ended(ready.call("submit_job", prompt="p")["id"])["status"] == "COMPLETED"


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [("import-error", "libcudart"), ("exits", "exited with code 7"), ("fails", "truncated")],
)
def test_ranks_do_not_come_up(serve: Callable[..., Served], behaviour: str, cause: str) -> None:
    """Ranks die at import, while loading, or of an error in the model: after a few deaths the slot
    counts as broken, the page and /healthz (503) say why, and it is retried slowly; jobs are
    accepted and wait."""
    served = serve(behaviour, MOCHI_BROKEN_AFTER="2", **QUICK)
    poll(lambda: served.slots()[0]["state"] == "broken", "a broken slot")
    assert cause in detail(served)
    assert refuses_health(served)
    job = served.call("submit_job", prompt="p")
    assert served.job(job["id"])["status"] == "PENDING"
    poll(lambda: served.slots()[0]["retry_seconds"] is not None, "a retry")


def test_a_model_takes_too_long_to_load(serve: Callable[..., Served]) -> None:
    """A model does not load within its time limit: the slot is restarted and says so."""
    served = serve("never", MOCHI_LOAD_TIMEOUT="1", MOCHI_BROKEN_AFTER="1", **QUICK)
    poll(lambda: "did not load within 1 seconds" in detail(served), "the cause")
    assert refuses_health(served)


def test_weights_are_corrupt_and_then_mended(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Weights are truncated: the slot is broken and names the file, without the server's folders;
    when the file is whole again, the waiting jobs are made without a restart of the server."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    os.truncate(model / WEIGHTS, 1000)
    served = serve(MOCHI_MODEL=str(model), **QUICK)
    poll(lambda: served.slots()[0]["state"] == "broken", "a broken slot")
    assert f"{WEIGHTS}: its header is damaged" in detail(served)
    assert str(tmp_path) not in httpx.get(f"{served.url}/healthz").text
    job = served.call("submit_job", prompt="a red ring", num_inference_steps=2)
    shutil.copy(TINY / WEIGHTS, model / WEIGHTS)
    assert served.ended(job["id"])["status"] == "COMPLETED"
