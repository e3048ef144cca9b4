"""What the app costs beside the model: end to end, at submit, and in the history.

    python -m tests.benchmarks.overhead [--rounds N] [--part end-to-end|submit|listing|all]
                                        [--output benchmark-results/overhead.json]

*end-to-end*: the same prompts, seeds and steps by turns through (a) a plain `MochiPipeline` call
and the app's own encode, in a process of its own with the threads and the OpenMP policy of a rank,
and (b) `/generate` of the really running app through gradio_client, the video fetched. Also the
seconds from submit to the first streamed item on an idle slot, where (b) spends its time beyond the
engine's stages, and whether the frames of (a) and (b) are equal, bit for bit.

*submit*: seconds of `/submit_job` through gradio_client and through plain HTTP (a post and its
event stream) with 0 and with 500 jobs waiting. The model cannot be loaded, so nothing is computed;
each job is cancelled, off the clock, before the next.

*listing*: `Studio.list_jobs` with 1k, 10k and 100k generated jobs, and `/list_jobs` through
gradio_client against a server on the same data folder. Before each call of the studio a
change is announced, as steps of running jobs do all the time. Its CPU time stands beside the wall
clock's, as a machine that computes other things adds its time slices to the latter.

The tables say what was measured on this machine under its load of the moment, which the JSON holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gradio_client import Client

from mochi_app.jobs import JobStatus
from mochi_app.model_defaults import load_model_defaults
from mochi_app.settings import load_settings
from mochi_app.slots.pool import Pool, threads_per_rank
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.studio import Studio
from tests.benchmarks import records
from tests.benchmarks.processes import (
    PlainPipeline,
    cpu_seconds,
    gradio_client,
    plain_pipeline,
    running_app,
    unloadable_model,
    wait_for_slots,
)
from tests.benchmarks.report import (
    Result,
    show_end_to_end,
    show_listing,
    show_submit,
    show_targets,
)

STEPS = (8, 64)
PENDING = (0, 500)
HISTORY_SIZES = (1_000, 10_000, 100_000)
PAGE_SIZE = 24
SUBMITS, STUDIO_CALLS, CLIENT_CALLS = 100, 300, 30  # timed calls behind each percentile
NEVER_AGAIN = {"MOCHI_RESTART_BACKOFF": "300"}  # a slot that did not load leaves the CPU alone

MOST_OVERHEAD = 0.4  # seconds, (b) - (a), median
MOST_FIRST_PROGRESS = 0.3  # seconds, median
MOST_LISTING = 0.005  # seconds, p95 of Studio.list_jobs with the largest history


# End to end


@dataclass(frozen=True, slots=True)
class AppRun:
    """One `/generate`. All in seconds; `first_*` from submit to a streamed item.

    `total` = `until_started` + `engine` + `around_engine` + `until_answered`. All but `engine` is
    `beyond_engine`: on a machine that computes other things, too, it says more than (b) - (a).
    """

    total: float
    beyond_engine: float
    first_item: float
    first_processing: float | None
    until_started: float  # from submit until the job's record says PROCESSING
    engine: float  # the stages that the rank measures
    around_engine: float  # the rest until COMPLETED: messages, moving files, the history
    until_answered: float  # from COMPLETED until the client has the video
    frames_hash: str


def measure_end_to_end(folder: Path, rounds: int) -> Result:
    """Both sides, by turns, for each number of steps."""
    settings = load_settings()
    with (
        plain_pipeline(folder, settings.model, threads_per_rank(settings)) as plain,
        running_app(folder / "end-to-end", MOCHI_MODEL=settings.model) as app,
        gradio_client(app, folder / "fetched") as client,
    ):
        wait_for_slots(app, "ready")
        request = end_to_end_request(0, STEPS[0])
        plain.make(request)
        generate(client, request)
        pids = {"rank": app.pids()[0], "app": app.process.pid, "client": os.getpid()}
        by_steps = {steps: compare(plain, client, pids, rounds, steps) for steps in STEPS}
    return {"threads": plain.threads, "rounds": rounds, "steps": by_steps}


def end_to_end_request(number: int, steps: int) -> Result:
    """Arguments of one video, those of the embedded model's defaults."""
    defaults = load_model_defaults(load_settings())
    return {
        "name": f"{steps}-{number}",
        "prompt": defaults.examples[number % len(defaults.examples)],
        "seed": 1000 + number,
        "num_inference_steps": steps,
        "guidance_scale": defaults.guidance_scale,
        "height": defaults.height,
        "width": defaults.width,
        "num_frames": defaults.num_frames,
        "fps": defaults.fps,
    }


def compare(
    plain: PlainPipeline, client: Client, pids: dict[str, int], rounds: int, steps: int
) -> Result:
    """`rounds` videos on each side, the order changing, so that noise meets both alike."""
    ours: list[Result] = []
    theirs: list[Result] = []
    for number in range(rounds):
        request = end_to_end_request(number, steps)
        for side in ("ab", "ba")[number % 2]:
            if side == "a":
                run, cpu = metered(partial(plain.make, request), {"a": plain.pid})
                theirs.append(run | {"cpu": cpu})
            else:
                run, cpu = metered(partial(generate, client, request), pids)
                ours.append(asdict(run) | {"cpu": cpu})
    return summary(theirs, ours) | {"runs": {"direct": theirs, "app": ours}}


def metered(run: Callable[[], Any], pids: dict[str, int]) -> tuple[Any, dict[str, float]]:
    """What `run` returns, and the CPU seconds that each process used meanwhile."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    result = run()
    return result, {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}


def summary(theirs: Sequence[Result], ours: Sequence[Result]) -> Result:
    """Medians of both sides, their difference, and where (b) spends its time."""

    def median(name: str) -> float | None:
        values = [run[name] for run in ours if run[name] is not None]
        return statistics.median(values) if values else None

    pairs = list(zip(theirs, ours, strict=True))
    direct = statistics.median(run["seconds"] for run in theirs)
    app = statistics.median(run["total"] for run in ours)
    parts = ("until_started", "engine", "around_engine", "until_answered", "beyond_engine")
    cpu = {name: statistics.median(run["cpu"][name] for run in ours) for name in ours[0]["cpu"]}
    return {
        "direct": direct,
        "app": app,
        "difference": app - direct,
        "ratio": app / direct,
        "paired_difference": statistics.median(b["total"] - a["seconds"] for a, b in pairs),
        "first_item": median("first_item"),
        "first_processing": median("first_processing"),
        "parts": {name: median(name) for name in parts},
        "cpu": {"(a)": statistics.median(run["cpu"]["a"] for run in theirs)} | cpu,
        "equal_frames": all(a["frames_hash"] == b["frames_hash"] for a, b in pairs),
    }


def generate(client: Client, request: Result) -> AppRun:
    """One video through `/generate`, watched as it comes."""
    asked = {name: value for name, value in request.items() if name not in ("name", "fps")}
    submitted, started = time.time(), time.perf_counter()
    call = client.submit(**asked, api_name="/generate")
    seen: list[tuple[float, Any]] = [(time.perf_counter() - started, item) for item in call]
    call.result()
    total = time.perf_counter() - started
    views = [(seconds, item) for seconds, item in seen if isinstance(item, dict)]
    processing = [
        seconds for seconds, view in views if view["status"] == JobStatus.PROCESSING.value
    ]
    job = client.predict(views[0][1]["id"], api_name="/get_job_status")
    engine = sum(job["seconds"].values())
    return AppRun(
        total=total,
        beyond_engine=total - engine,
        first_item=views[0][0],
        first_processing=min(processing, default=None),
        until_started=job["started_processing_at"] - submitted,
        engine=engine,
        around_engine=job["completed_processing_at"] - job["started_processing_at"] - engine,
        until_answered=submitted + total - job["completed_processing_at"],
        frames_hash=job["hashes"]["frames"],
    )


# Submit


def measure_submit(folder: Path) -> Result:
    """Both doors, with each number of jobs waiting."""
    settings = {"MOCHI_MODEL": str(unloadable_model(folder)), **NEVER_AGAIN}
    with (
        running_app(folder / "submit", **settings) as app,
        gradio_client(app, folder / "fetched") as client,
        httpx.Client(base_url=app.url, timeout=60) as http,
    ):
        wait_for_slots(app, "restarting", "broken")
        doors: dict[str, Callable[[], Result]] = {
            "gradio_client": lambda: client.predict(prompt="a red ball", api_name="/submit_job"),
            "http": lambda: call_by_http(http, "submit_job", prompt="a red ball"),
        }
        waiting, result = 0, {}
        for pending in PENDING:
            for _ in range(pending - waiting):
                call_by_http(http, "submit_job", prompt="a job that waits")
            waiting = pending
            total = call_by_http(http, "list_jobs", status="PENDING")["total"]
            assert total == pending, f"{total} jobs wait, expected {pending}"
            result[pending] = {
                name: percentiles(submit_and_cancel(door, http)) for name, door in doors.items()
            }
    return result


def submit_and_cancel(submit: Callable[[], Result], http: httpx.Client) -> list[float]:
    """Seconds of each submit; each job is cancelled before the next one."""
    seconds = []
    for number in range(SUBMITS + 5):
        started = time.perf_counter()
        job = submit()
        if number >= 5:  # the first ones warm up
            seconds.append(time.perf_counter() - started)
        call_by_http(http, "cancel_job", job_id=job["id"])
    return seconds


def call_by_http(http: httpx.Client, endpoint: str, **parameters: Any) -> Result:
    """A named endpoint without a Gradio client: a post, then its event stream to the end.

    Raises:
        RuntimeError: the call did not complete.
    """
    posted = http.post(f"/gradio_api/call/v2/{endpoint}", json=parameters).raise_for_status()
    event, answer = "", "null"
    path = f"/gradio_api/call/{endpoint}/{posted.json()['event_id']}"
    with http.stream("GET", path) as stream:
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            event = value if name == "event" else event
            answer = value if name == "data" else answer
    if event != "complete":
        raise RuntimeError(f"{endpoint} ended with {event}: {answer[:300]}")
    result: Result = json.loads(answer)[0]
    return result


# Listing


def questions(count: int) -> dict[str, Result]:
    """What is asked of a history of `count` jobs. `red` is in every fifth prompt or so."""
    return {
        "first page": {},
        "last page": {"page": max(1, count * 98 // 100 // PAGE_SIZE)},
        "status": {"status": "COMPLETED"},
        "status, deep": {"status": "COMPLETED", "page": max(1, count // 2 // PAGE_SIZE)},
        "status PENDING": {"status": "PENDING"},
        "word": {"query": "red"},
        "word of all": {"query": "light"},
        "word + status": {"query": "red", "status": "FAILED"},
        "two words": {"query": "pink robot"},
        "prefix": {"query": "tri"},
        "short prefix": {"query": "s"},
        "none found": {"query": "nothinglikethis"},
    }


def measure_listing(folder: Path, sizes: Sequence[int] = HISTORY_SIZES) -> Result:
    """Each size of history in process, then behind a server."""
    result = {}
    for size in sizes:
        data_dir = folder / f"listing-{size}"
        write_seconds = records.fill(data_dir, size)
        in_process = asyncio.run(list_in_process(data_dir, size, unloadable_model(folder)))
        served = list_through_client(data_dir, size, folder)
        result[size] = {"write_seconds": write_seconds, "studio": in_process, "client": served}
    return result


async def list_in_process(data_dir: Path, size: int, model: Path) -> Result:
    """`Studio.list_jobs` on this data folder, its slots never started."""
    settings = load_settings(data_dir=data_dir, model=str(model))
    started = time.perf_counter()
    history = await History.open(data_dir)
    opened = time.perf_counter() - started
    media = MediaStore(data_dir)
    studio = Studio(
        settings, load_model_defaults(settings), history, media, Pool(settings, media.scratch)
    )
    calls = {}
    for name, question in questions(size).items():
        ask = partial(studio.list_jobs, **question)
        seconds = timed(ask, STUDIO_CALLS, before=studio.changed.beat)
        cpu = timed(ask, STUDIO_CALLS, before=studio.changed.beat, clock=time.thread_time)
        calls[name] = percentiles(seconds) | {
            "cpu_p95": percentiles(cpu)["p95"],
            "total": ask()["total"],
        }
    await history.close()
    return {"open_seconds": opened, "calls": calls}


def list_through_client(data_dir: Path, size: int, folder: Path) -> Result:
    """`/list_jobs` of a real server on this data folder."""
    settings = {"MOCHI_MODEL": str(unloadable_model(folder)), **NEVER_AGAIN}
    started = time.perf_counter()
    with running_app(data_dir, **settings) as app:
        answered_after = time.perf_counter() - started
        wait_for_slots(app, "restarting", "broken")
        with gradio_client(app, folder / "fetched") as client:
            calls = {
                name: percentiles(
                    timed(partial(client.predict, **question, api_name="/list_jobs"), CLIENT_CALLS)
                )
                for name, question in questions(size).items()
            }
    return {"answered_after_seconds": answered_after, "calls": calls}


# Numbers


def timed(
    call: Callable[[], object],
    count: int,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of `count` calls, after three that warm up; `before` each, off the clock."""
    seconds = []
    for number in range(count + 3):
        before()
        started = clock()
        call()
        if number >= 3:
            seconds.append(clock() - started)
    return seconds


def percentiles(seconds: Iterable[float]) -> Result:
    """Median, 95th percentile and the longest, in seconds."""
    values = np.array(list(seconds))
    p50, p95 = (float(np.percentile(values, part)) for part in (50, 95))
    return {"p50": p50, "p95": p95, "max": float(values.max()), "calls": len(values)}


def targets(results: Result) -> list[Result]:
    """What was promised, and whether it was kept. Only for the parts that were measured."""
    found: list[tuple[str, float | None, float]] = []
    for steps, one in results.get("end-to-end", {}).get("steps", {}).items():
        found += [
            (f"(b) - (a) at {steps} steps", one["difference"], MOST_OVERHEAD),
            (f"first item at {steps} steps", one["first_item"], MOST_FIRST_PROGRESS),
            (f"first PROCESSING at {steps} steps", one["first_processing"], MOST_FIRST_PROGRESS),
        ]
    listing = results.get("listing", {})
    if listing:
        calls = listing[max(listing)]["studio"]["calls"]
        found += [
            (f"list_jobs p95, {max(listing)} jobs, {name}", one["p95"], MOST_LISTING)
            for name, one in calls.items()
        ]
    return [
        {"name": name, "seconds": value, "most": most, "met": value is not None and value <= most}
        for name, value, most in found
    ]


# Command line


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead")
    parser.add_argument("--rounds", type=int, default=5, help="videos on each side and step count")
    parser.add_argument("--part", choices=("end-to-end", "submit", "listing", "all"), default="all")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results/overhead.json"))
    arguments = parser.parse_args()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    measures: dict[str, tuple[Callable[[Path], Result], Callable[[Result], None]]] = {
        "end-to-end": (lambda at: measure_end_to_end(at, arguments.rounds), show_end_to_end),
        "submit": (measure_submit, show_submit),
        "listing": (measure_listing, show_listing),
    }
    results: Result = {"machine": machine(), "load": {}}
    with tempfile.TemporaryDirectory(prefix="mochi-benchmark-") as folder:
        for part, (measure, show) in measures.items():
            if arguments.part in (part, "all"):
                before = os.getloadavg()
                results[part] = measure(Path(folder))
                results["load"][part] = {"before": before, "after": os.getloadavg()}
                show(results[part])
    results["targets"] = targets(results)
    if results["targets"]:
        show_targets(results["targets"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nload average {os.getloadavg()[0]:.2f}; written to {arguments.output}")


def machine() -> Result:
    """What the numbers depend on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    main()
