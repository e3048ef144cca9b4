"""Ends of the server, polite and not, and what its next start finds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import alive
from tests.serving import Refusal, Served, poll

Serve = Callable[..., Served]
QUICK: dict[str, Any] = {"num_inference_steps": 2}
SLOW: dict[str, Any] = {"prompt": "slow", "num_inference_steps": 40}  # 2 s
LONG: dict[str, Any] = {"prompt": "slow", "num_inference_steps": 500}  # 25 s


def busy(served: Served, steps: int = 40) -> tuple[str, list[str]]:
    """A job that runs and three that wait, the oldest first."""
    running = served.call("submit_job", prompt="slow", num_inference_steps=steps)["id"]
    served.running(running)
    waiting = [served.call("submit_job", prompt=f"waits {n}", **QUICK)["id"] for n in range(3)]
    return running, waiting


def nothing_left(children: Sequence[int], data_dir: Path) -> None:
    """No rank lives on, and nobody holds the folder's lock."""
    poll(lambda: not any(alive(pid) for pid in children), "the end of the ranks", 10)
    with (data_dir / "server.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def all_made_once(served: Served, job_ids: Sequence[str]) -> None:
    """Each of these is there, made once, in this order, and no other."""
    ended = [served.ended(job_id) for job_id in job_ids]
    assert {(job["status"], job["attempts"]) for job in ended} == {("COMPLETED", 1)}
    starts = [job["started_processing_at"] for job in ended]
    assert starts == sorted(starts)
    listed = served.call("list_jobs")["jobs"]
    assert [job["id"] for job in listed] == sorted(job_ids, reverse=True)
    assert len(list((served.data_dir / "videos").glob("*.mp4"))) == len(job_ids)


def test_a_polite_end_with_work_in_hand(serve: Serve) -> None:
    """SIGTERM while a job runs and others wait: the server exits within seconds, leaves no rank and
    no lock behind, and the next start makes each job once, in order."""
    served = serve("ok").ready()
    running, waiting = busy(served, steps=200)
    children = served.pids()
    assert served.terminate() in (0, -signal.SIGTERM)
    nothing_left(children, served.data_dir)
    all_made_once(serve("ok"), [running, *waiting])


def test_a_kill_with_work_in_hand(serve: Serve) -> None:
    """SIGKILL while a job runs and others wait: no rank and no lock stays behind, and the next
    start makes each job once, in order."""
    served = serve("ok").ready()
    running, waiting = busy(served, steps=200)
    children = served.pids()
    served.kill()
    nothing_left(children, served.data_dir)
    all_made_once(serve("ok"), [running, *waiting])


def test_a_kill_right_after_a_cancel(serve: Serve) -> None:
    """SIGKILL right after the cancel of a running job was confirmed, before its slot has stopped:
    the next start does not run it again, and it is CANCELLED; waiting jobs are made."""
    served = serve("ok").ready()
    running = served.call("submit_job", prompt="slowest", num_inference_steps=100)["id"]
    served.running(running)
    waiting = served.call("submit_job", prompt="waits", **QUICK)["id"]
    assert served.call("cancel_job", job_id=running)["status"] == "PROCESSING"
    served.kill()
    again = serve("ok")
    assert again.ended(waiting)["status"] == "COMPLETED"
    job = again.job(running)
    assert (job["status"], job["attempts"]) == ("CANCELLED", 1)


def test_a_kill_between_a_video_and_its_record(serve: Serve) -> None:
    """SIGKILL when a video is in place but its record is not yet written: the next start adopts the
    video; the job is not run again."""
    served = serve("ok").ready()
    running, waiting = busy(served)
    database = served.data_dir / "history" / "cache.db"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # the record has to wait
        video = served.data_dir / "videos" / f"{running}.mp4"
        poll(video.is_file, "the video in place")
        assert served.job(running)["status"] == "PROCESSING"
        made = video.stat()
        served.kill()
    again = serve("ok")
    all_made_once(again, [running, *waiting])
    assert video.stat() == made
    assert again.job(running)["poster_url"]


def test_an_end_while_the_model_loads(serve: Serve) -> None:
    """SIGTERM while the model is loading and a job waits: the server exits within seconds, no rank
    stays behind, and the job is kept."""
    served = serve("never")
    job = served.call("submit_job", prompt="early", **QUICK)["id"]
    poll(lambda: served.slots()[0]["state"] == "loading", "the load")
    children = served.pids()
    assert served.terminate() in (0, -signal.SIGTERM)
    nothing_left(children, served.data_dir)
    all_made_once(serve("ok"), [job])


def test_a_kill_right_after_a_submit(serve: Serve) -> None:
    """SIGKILL right after a submit has returned, and the caller submits again with the same
    request_id: the job is there, and there is only one."""
    served = serve("ok").ready()
    jobs = []
    for number in range(3):
        asked = {"prompt": "just asked", "request_id": f"number {number}", **QUICK}
        jobs.append(served.call("submit_job", **asked)["id"])
        served.kill()
        served = serve("ok")
        assert served.call("submit_job", **asked)["id"] == jobs[-1]
    all_made_once(served, jobs)


def test_two_kills_in_a_row(serve: Serve) -> None:
    """SIGKILL, again while the next start recovers, and again when it runs: each job is made once,
    in order."""
    served = serve("ok").ready()
    running, waiting = busy(served, steps=100)
    served.kill()
    again = serve("never")  # it answers, its model does not load
    again.kill()
    third = serve("ok")
    third.running(running)
    third.kill()
    all_made_once(serve("ok"), [running, *waiting])


@contextlib.contextmanager
def watching(url: str, parameters: dict[str, Any], tabs: int = 3) -> Iterator[list[str]]:
    """So many open pages, and one caller who waits for its video; what each heard last."""
    heard: list[str] = []

    def listen(method: str, address: str, body: dict[str, Any] | None) -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream(method, address, json=body, timeout=60) as stream,
        ):
            for line in stream.iter_lines():
                heard.append(line)

    base = f"{url}/gradio_api"
    event = httpx.post(f"{base}/call/v2/generate", json=parameters).json()["event_id"]
    addresses = [f"{base}/call/generate/{event}"]
    for tab in range(tabs):
        addresses += [f"{url}/events", f"{base}/heartbeat/tab{tab}"]
    threads = [
        threading.Thread(target=listen, args=("GET", address, None)) for address in addresses
    ]
    for thread in threads:
        thread.start()
    yield heard
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a stream stays open"


def test_an_end_while_pages_are_open(serve: Serve) -> None:
    """SIGTERM while pages and callers hold streams open: the server still exits within seconds,
    every stream ends, and the next start makes the job."""
    served = serve("ok").ready()
    asked = LONG | {"num_inference_steps": 100, "request_id": "watched"}
    with watching(served.url, asked) as heard:
        job = served.call("submit_job", **asked)["id"]
        served.running(job)
        poll(lambda: len(heard) > 10, "the streams to flow")
        children = served.pids()
        assert served.terminate(10) in (0, -signal.SIGTERM)
    nothing_left(children, served.data_dir)
    all_made_once(serve("ok"), [job])


def frozen(pids: Sequence[int], seconds: float) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)  # that is the harm: longer than every deadline
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)


SHORT = {"MOCHI_HEARTBEAT_TIMEOUT": "2", "MOCHI_STEP_TIMEOUT": "2"}


def test_a_frozen_server(serve: Serve) -> None:
    """The server is stopped (SIGSTOP) for longer than the heartbeat timeout, and continued: no rank
    is killed, and the running job is made at its first attempt."""
    served = serve("ok", **SHORT).ready()
    running, waiting = busy(served, steps=150)
    ranks = served.pids()
    frozen([served.process.pid], 5)
    all_made_once(served, [running, *waiting])
    assert served.pids() == ranks


def test_a_frozen_machine(serve: Serve) -> None:
    """Server and ranks are stopped together for longer than every deadline, as by a suspended
    machine or `docker pause`: no rank is killed, and the running job is made at its first
    attempt."""
    served = serve("ok", **SHORT).ready()
    running, waiting = busy(served, steps=150)
    ranks = served.pids()
    frozen([served.process.pid, *ranks], 5)
    all_made_once(served, [running, *waiting])
    assert served.pids() == ranks


def felled(served: Served, job_id: str, flag: Path, times: int = 1) -> None:
    """Let the job take the server down so often; the next start is left to the caller."""
    for number in range(times):
        served.running(job_id)
        flag.touch()
        poll(lambda: served.process.poll() is not None, "the end of the server")
        flag.unlink()
        if number < times - 1:
            served.start()


def test_a_job_that_takes_the_server_down(serve: Serve, tmp_path: Path) -> None:
    """The server dies (SIGKILL) at each start of one job: after three deaths with no new checkpoint
    in between the job is held and says why, the others are made, and one call retries it."""
    flag = tmp_path / "now"
    served = serve("ok").ready()
    asked = {"prompt": f"fell {flag}", "request_id": "bad", **QUICK}
    bad = served.call("submit_job", **asked)["id"]
    other = served.call("submit_job", prompt="waits", **QUICK)["id"]
    felled(served, bad, flag, times=3)
    served.start()
    made = served.ended(other)
    assert (made["status"], made["attempts"]) == ("COMPLETED", 1)
    job = served.job(bad)
    assert (job["status"], job["position"], job["eta_seconds"]) == ("PENDING", None, None)
    assert job["held"].startswith("the server ended 3 times while this job ran")
    assert "retry_job" in job["held"]
    assert served.call("submit_job", **asked)["held"] == job["held"]
    with pytest.raises(Refusal, match="held: the server ended 3 times"):
        served.call("generate", **asked)
    served.ready()
    metrics = served.get("/metrics").text
    assert "mochi_jobs_held 1.0" in metrics
    assert "mochi_queue_length 0.0" in metrics
    served.terminate()
    served.start().ready()
    assert served.job(bad)["held"] == job["held"]
    with pytest.raises(Refusal, match="COMPLETED"):
        served.call("retry_job", job_id=other)
    again = served.call("retry_job", job_id=bad)
    assert (again["id"], again["held"], again["server_deaths"]) == (bad, None, 0)
    felled(served, bad, flag)
    served.start()
    served.running(bad)
    job = served.job(bad)
    assert (job["held"], job["server_deaths"]) == (None, 1)
    served.call("cancel_job", job_id=bad)
    served.kill()
    assert serve("ok").ended(bad)["status"] == "CANCELLED"


def test_neighbours_of_a_job_that_takes_the_server_down(serve: Serve, tmp_path: Path) -> None:
    """A job kills the server while another runs beside it: from then on the two run one at a time,
    the innocent one is made, and only the other is held."""
    flag = tmp_path / "now"
    served = serve("ok", MOCHI_SLOTS="cpu;cpu").ready()
    neighbour = served.call("submit_job", prompt="slow", num_inference_steps=150)["id"]
    served.running(neighbour)
    bad = served.call("submit_job", prompt=f"fell {flag}", **QUICK)["id"]
    felled(served, bad, flag)
    waits = [job["server_deaths"] for job in (served.start().job(neighbour), served.job(bad))]
    assert waits == [1, 1]
    served.running(neighbour)
    assert served.job(bad)["status"] == "PENDING"  # though a slot is ready
    ended = served.ended(neighbour)
    assert (ended["status"], ended["attempts"], ended["server_deaths"]) == ("COMPLETED", 1, 0)
    felled(served, bad, flag, times=2)
    served.start()
    assert served.job(bad)["held"]
    after = served.ended(served.call("submit_job", prompt="after", **QUICK)["id"])
    assert after["status"] == "COMPLETED"


def test_planned_ends_hold_no_job(serve: Serve) -> None:
    """The server is stopped (SIGTERM) while a job runs, and killed before it has exited: the job is
    not blamed, however often that happens."""
    served = serve("ok", MOCHI_DRAIN_SECONDS="4").ready()
    job_id = served.call("submit_job", prompt="slowest", num_inference_steps=100)["id"]
    for _ in range(4):
        served.running(job_id)
        served.process.send_signal(signal.SIGTERM)
        poll(lambda: "SIGTERM: stopping" in served.log.read_text(), "the signal to be heard")
        served.kill()
        served.log.unlink()
        served.start()
    served.running(job_id)
    job = served.job(job_id)
    assert (job["status"], job["held"], job["server_deaths"]) == ("PROCESSING", None, 0)
