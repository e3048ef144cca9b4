"""What many clients cost those who work: a flood that nobody reads, and a crowd that watches.

    python -m tests.benchmarks.flood [--part flood|crowd|all] [--jobs N] [--engine faked|embedded]
                                     [--output benchmark-results/flood.json]

*flood*: while jobs wait and run, 5,000 calls are posted from this machine's address and never read.
Another client, whose address differs (a trusted proxy names it), asks for one job's status all the
while. Counted: jobs that did not become videos, tickets that the queue lost, what the flood was
answered. *crowd*: 100 pages listen to `/events` and 100 callers wait in `/generate` while up to
1,000 jobs wait; again one client asks for a status all the while.

Both print p50 and p95 of `get_job_status` (a post and its event stream), before and meanwhile, the
CPU of the server, and its memory. Clients share the cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.benchmarks.overhead import machine
from tests.benchmarks.processes import cpu_seconds, wait_for_slots
from tests.benchmarks.report import Result, milliseconds, show_targets, table
from tests.crowds import CONNECTIONS, Answers, browser, call, flood, listen, statuses
from tests.serving import Served, poll

POSTS = 5000
PAGES = CALLERS = 100
PENDING = 1000
QUIET_SECONDS, CROWD_SECONDS = 5.0, 30.0
STATUS_PAUSE = 0.1  # seconds between two questions for a status
MOST_STATUS = 1.0  # seconds, p95 of get_job_status meanwhile
SMALL = {"height": 64, "width": 64, "num_frames": 7}
FLOOD_ADDRESS, OTHER_ADDRESS = "10.9.9.9", "10.1.1.1"
PROXY = {"MOCHI_TRUSTED_PROXIES": "127.0.0.1", "MOCHI_MAX_PENDING": str(PENDING)}


def started(folder: Path, engine: str) -> Served:
    """A server whose slot is ready."""
    faked = ("-m", "tests.faults.server", "ok")
    program = faked if engine == "faked" else ("app.py",)
    served = Served(folder, program=program, **PROXY).start()
    wait_for_slots(served, "ready")
    return served


async def submit(served: Served, count: int, steps: int) -> list[str]:
    """`count` jobs of the smallest size; their ids."""
    ids: list[str] = []
    async with browser(served.url) as client:
        numbers = iter(range(count))

        async def some() -> None:
            for number in numbers:
                asked = {"prompt": f"slow {number}", "num_inference_steps": steps} | SMALL
                text = await call(client, "submit_job", asked)
                ids.append(json.loads(text.split("data: ")[-1])[0]["id"])

        await asyncio.gather(*(some() for _ in range(CONNECTIONS)))
    return ids


async def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work` in a process of its own, so that a busy client does not slow the one that asks."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        return await asyncio.get_running_loop().run_in_executor(other, work, *arguments)


def flood_from(url: str) -> Answers:
    """The flood, from one address."""
    return asyncio.run(flood(url, POSTS, forwarded_for=lambda _: FLOOD_ADDRESS))


def listen_to(*arguments: Any) -> dict[str, int]:
    """The crowd."""
    return asyncio.run(listen(*arguments))


async def asked_during(
    served: Served, job_id: str, work: Callable[[], Awaitable[Any]]
) -> tuple[Result, Any]:
    """Percentiles of the status calls, the CPU and the memory of the server while `work` runs."""
    done = asyncio.Event()
    asking = asyncio.create_task(
        statuses(served.url, job_id, done, STATUS_PAUSE, forwarded_for=OTHER_ADDRESS)
    )
    cpu, began = cpu_seconds(served.process.pid), time.perf_counter()
    result = await work()
    seconds = time.perf_counter() - began
    cpu = cpu_seconds(served.process.pid) - cpu
    done.set()
    taken = np.array(await asking)
    p50, p95 = (float(np.percentile(taken, part)) for part in (50, 95))
    measured = {"p50": p50, "p95": p95, "max": float(taken.max()), "calls": len(taken)}
    memory = {"memory_mib": served.memory_mib}
    return measured | memory | {"seconds": seconds, "cores": cpu / seconds}, result


def by_status(served: Served) -> dict[str, int]:
    """How many jobs are in which state."""
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    lines = re.findall(r'^mochi_jobs\{status="(\w+)"\} (\d+)', text, re.M)
    return {name: int(count) for name, count in lines}


def lost(served: Served, jobs: int, *, wait: bool) -> Result:
    """Jobs that are not there any more or did not become videos, and what the log tells.

    With `wait` nothing waits or runs any more when this returns.
    """
    active = ("pending", "processing")
    if wait:
        poll(lambda: not sum(by_status(served)[name] for name in active), "the jobs' end", 600)
    found = by_status(served)
    log = served.log.read_text()
    return {
        "jobs": jobs,
        "jobs_lost": jobs - sum(found[name] for name in ("completed", *active)),
        "tries_more": log.count("queued again"),
        "tickets_lost": log.count("a ticket was lost"),
        "queue_deaths": log.count("Gradio's queue stopped"),
    }


async def measure_flood(served: Served, jobs: int) -> Result:
    """The flood, and what it cost."""
    ids = await submit(served, jobs, 100)
    quiet, _ = await asked_during(served, ids[0], lambda: asyncio.sleep(QUIET_SECONDS))
    answers: Answers
    during, answers = await asked_during(served, ids[0], lambda: elsewhere(flood_from, served.url))
    result = {"posts": POSTS, "answers": dict(answers.codes), "quiet": quiet, "during": during}
    return result | lost(served, len(ids), wait=True)


async def measure_crowd(served: Served, jobs: int) -> Result:
    """The crowd, and what it cost."""
    ids = await submit(served, PENDING - CALLERS, 8)
    quiet, _ = await asked_during(served, ids[-1], lambda: asyncio.sleep(QUIET_SECONDS))
    asked = {"prompt": "slow", "num_inference_steps": 8} | SMALL
    crowd = (served.url, PAGES, CALLERS, asked, CROWD_SECONDS)
    during, heard = await asked_during(served, ids[-1], lambda: elsewhere(listen_to, *crowd))
    result = {"pages": PAGES, "callers": CALLERS, "heard": heard, "quiet": quiet, "during": during}
    return result | lost(served, len(ids) + CALLERS, wait=False)


def show(name: str, result: Result) -> None:
    """Print one part."""
    rows = [
        (
            when,
            *milliseconds(result[when]),
            str(result[when]["calls"]),
            f"{result[when]['cores']:.2f}",
            f"{result[when]['memory_mib']:.0f}",
        )
        for when in ("quiet", "during")
    ]
    heads = ("", "p50", "p95", "max", "calls", "server's cores", "MiB")
    table(f"{name}: get_job_status, milliseconds", heads, rows)
    counted = ("posts", "answers", "pages", "callers", "heard", "jobs", "jobs_lost")
    more = ("tries_more", "tickets_lost", "queue_deaths")
    rows = [(key, str(result[key])) for key in (*counted, *more) if key in result]
    table(f"{name}: what came of it", ("", ""), rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flood")
    parser.add_argument("--part", choices=("flood", "crowd", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=10, help="jobs that run during the flood")
    parser.add_argument("--engine", choices=("faked", "embedded"), default="faked")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results/flood.json"))
    arguments = parser.parse_args()
    measures = {"flood": measure_flood, "crowd": measure_crowd}
    results: Result = {"machine": machine(), "engine": arguments.engine, "load": os.getloadavg()}
    targets: list[Result] = []
    for part, measure in measures.items():
        if arguments.part not in (part, "all"):
            continue
        with ExitStack() as ending:
            folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="mochi-flood-"))
            served = started(Path(folder) / "data", arguments.engine)
            ending.callback(served.end)
            results[part] = asyncio.run(measure(served, arguments.jobs))
        show(part, results[part])
        p95 = results[part]["during"]["p95"]
        name = f"get_job_status p95 during the {part}"
        targets.append(
            {"name": name, "seconds": p95, "most": MOST_STATUS, "met": p95 <= MOST_STATUS}
        )
    results["targets"] = targets
    show_targets(targets)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
