"""The real app as its operators meet it: starts and their refusals, probes, signals, kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from mochi_app.files import PROJECT_DIR
from tests.conftest import alive
from tests.serving import Served, free_port, poll
from tests.small_jobs import LONG, QUICK, SMALL


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Servers of the test's own."""
    started: list[Served] = []

    def start(**settings: str) -> Served:
        started.append(Served(tmp_path / "data", **settings))
        return started[-1].start()

    yield start
    for served in started:
        served.end()


def test_the_web_process_has_not_imported_torch(app: Served) -> None:
    maps = Path(f"/proc/{app.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{app.pids()[0]}/maps").read_text()


def test_nothing_of_the_web_imports_torch() -> None:
    code = (
        "import sys, mochi_app.app;"
        "bad = {'torch', 'diffusers', 'transformers'} & set(sys.modules);"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, check=True, timeout=60)


def test_a_deleted_video_is_gone_at_once_and_from_disk_with_the_trash(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    cache = tmp_path / "gradio"
    app = serve(GRADIO_TEMP_DIR=str(cache)).ready()
    job = app.ended(app.call("submit_job", prompt="soon gone", **QUICK)["id"])
    served = app.call("get_output_file", job_id=job["id"])["url"]
    for url in (f"{app.url}{job['video_url']}", served):
        httpx.get(url).raise_for_status()
    assert not list(cache.rglob("*.mp4")), "Gradio keeps a copy that no delete would reach"
    app.call("delete_job", job_id=job["id"])
    for url in (f"{app.url}{job['video_url']}", f"{app.url}{job['poster_url']}", served):
        assert httpx.get(url).status_code in (403, 404)
    assert app.call("list_jobs")["total"] == 0
    app.terminate()
    again = serve(MOCHI_TRASH_HOURS="0")  # the janitor's first round is at the start
    poll(
        lambda: not [path for path in again.data_dir.rglob(f"{job['id']}*") if path.is_file()],
        "the trash to be emptied",
    )


def test_probes_and_metrics(app: Served) -> None:
    assert httpx.get(f"{app.url}/livez").text == "ok\n"
    health = httpx.get(f"{app.url}/healthz").json()
    assert health["ok"] is True
    assert health["slots"][0]["state"] in ("ready", "busy")
    metrics = httpx.get(f"{app.url}/metrics").text
    for name in (
        "mochi_jobs{",
        "mochi_slot_up{",
        "mochi_slot_restarts_total{",
        "mochi_videos_bytes ",
    ):
        assert name in metrics


@pytest.mark.slow
def test_two_slots_run_two_at_a_time_and_survive_a_kill(serve: Callable[..., Served]) -> None:
    app = serve(MOCHI_SLOTS="cpu;cpu")
    poll(lambda: [s["state"] for s in app.slots()] == ["ready", "ready"], "two ready slots", 90)
    before = app.pids()
    first = app.call("submit_job", prompt="one of ten", **SMALL | {"num_inference_steps": 200})
    jobs = [first] + [app.call("submit_job", prompt="one of ten", **QUICK) for _ in range(9)]
    app.running(first["id"])
    victim = next(slot for slot in app.slots() if slot["job_id"] == first["id"])
    os.kill(victim["pids"][0], signal.SIGKILL)
    done = [app.ended(job["id"]) for job in jobs]
    assert [job["status"] for job in done] == ["COMPLETED"] * 10
    assert [job["attempts"] for job in done] == [2] + [1] * 9
    poll(lambda: len(app.pids()) == 2, "the restart")
    kept = [pid for pid in before if pid != victim["pids"][0]]
    assert set(kept) < set(app.pids())


@pytest.mark.slow
def test_kill_9_loses_no_job(serve: Callable[..., Served]) -> None:
    app = serve().ready()
    finished = app.ended(app.call("submit_job", prompt="finished", **QUICK)["id"])
    enhanced = app.ended(app.call("enhance_job", job_id=finished["id"])["id"])
    running = app.call("submit_job", prompt="running", **SMALL | {"num_inference_steps": 100})
    waiting = [app.call("submit_job", prompt="waiting", **QUICK) for _ in range(2)]
    app.running(running["id"])
    children = app.pids()
    app.kill()
    poll(lambda: not any(alive(pid) for pid in children), "the end of the orphans", 5)
    again = serve()
    order = [again.ended(job["id"]) for job in (running, *waiting)]
    assert [job["status"] for job in order] == ["COMPLETED"] * 3
    starts = [job["started_processing_at"] for job in order]
    assert starts == sorted(starts)
    listed = [job["id"] for job in again.call("list_jobs")["jobs"]]
    newest_first = [job["id"] for job in (*reversed(order), enhanced, finished)]
    assert listed == newest_first
    for job in order:
        assert httpx.get(f"{again.url}{job['video_url']}").status_code == 200


@pytest.mark.slow
def test_sigterm_ends_in_time_with_open_streams_and_leaves_no_child(
    serve: Callable[..., Served],
) -> None:
    app = serve().ready()
    job = app.call("submit_job", prompt="to be continued", **LONG)
    app.running(job["id"])
    children = app.pids()
    session = f"{app.url}/gradio_api/heartbeat/session"
    with httpx.stream("GET", f"{app.url}/events") as events, httpx.stream("GET", session) as beats:
        next(events.iter_lines())
        next(beats.iter_lines())
        assert app.terminate() in (0, -signal.SIGTERM)
    assert not any(alive(pid) for pid in children)
    again = serve()
    assert again.job(job["id"])["status"] in ("PENDING", "PROCESSING")
    again.call("cancel_job", job_id=job["id"])


def test_the_server_answers_before_its_model_is_loaded(serve: Callable[..., Served]) -> None:
    app = serve()
    health = httpx.get(f"{app.url}/healthz")
    assert health.status_code == 503
    assert health.json()["reasons"] == ["no slot is ready"]
    assert health.json()["slots"][0]["state"] in ("starting", "loading")
    job = app.call("submit_job", prompt="early bird", **QUICK)
    assert app.ended(job["id"])["status"] == "COMPLETED"


def test_a_second_server_on_the_same_data_is_refused(app: Served) -> None:
    environment = os.environ | {
        "MOCHI_DATA_DIR": str(app.data_dir),
        "GRADIO_SERVER_PORT": str(free_port()),
    }
    second = subprocess.run(
        [sys.executable, "app.py"],
        cwd=PROJECT_DIR,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 2
    assert str(app.process.pid) in second.stderr
    assert "Traceback" not in second.stderr


def test_a_bad_setting_stops_the_start_with_its_name() -> None:
    bad = subprocess.run(
        [sys.executable, "app.py"],
        cwd=PROJECT_DIR,
        env=os.environ | {"MOCHI_PREVIEW_STEPS": "one"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert bad.returncode == 2
    assert "MOCHI_PREVIEW_STEPS='one'" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_port_in_use_is_told(app: Served, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"MOCHI_DATA_DIR": str(tmp_path / "other"), "GRADIO_SERVER_PORT": port}
        second = subprocess.run(
            [sys.executable, "app.py"],
            cwd=PROJECT_DIR,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert second.returncode != 0
    assert port in second.stderr
