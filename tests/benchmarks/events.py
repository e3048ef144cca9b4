"""What it costs to watch: bytes a second of a page's live events, by how many jobs wait.

    python -m tests.benchmarks.events [--waiting 1,200,1000] [--pages 100] [--seconds 16]
                                      [--engine faked|embedded]
                                      [--output benchmark-results/events.json]

One job runs and so many wait. A *visible* page names what `page/stream.js` does: the newest 24
jobs, and in its panel the one that runs, with its picture, beside the next one. A *hidden* one
looks at its job when the server told it to, a *script* names nothing. Each is measured from its
opening on, which sends the views of all jobs that are named; what that took is told apart, too.
Then many visible pages listen at a time: the CPU of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from tests.benchmarks.overhead import machine
from tests.benchmarks.processes import cpu_seconds, wait_for_slots
from tests.benchmarks.records import queue_up
from tests.benchmarks.report import Result, table
from tests.conftest import eventually
from tests.listening import Heard, address, listening
from tests.serving import Served

SHOWN = 24  # jobs on a page of the history
STEPS = 512  # so that one job runs all the while
MOST = {"visible": 15_000, "hidden": 3_000}  # bytes a second and page


def started(folder: Path, engine: str, jobs: int) -> tuple[Served, list[str]]:
    """A server with so many jobs, the first of which runs; their ids, in order."""
    ids = queue_up(folder, jobs, "slow pictured", num_inference_steps=STEPS)
    program = ("-m", "tests.faults.server", "ok") if engine == "faked" else ("app.py",)
    served = Served(folder, program=program, MOCHI_MAX_PENDING=str(jobs)).start()
    wait_for_slots(served, "busy")
    served.running(ids[0])
    return served, ids


def visible(ids: list[str]) -> str:
    """What a page asks for that shows the newest jobs, the one that runs and the one after it."""
    named = list(dict.fromkeys([*ids[:2], *ids[-SHOWN:]]))
    return address(named, pictures=named)


async def measure(served: Served, ids: list[str], pages: int, seconds: float) -> Result:
    """Bytes a second of each kind of page, side by side; then the CPU while many listen."""
    first = ids[0]
    paths = {
        "visible": visible(ids),
        "hidden": address([first], hidden="true"),
        "script": address(),
    }
    heard = {kind: Heard() for kind in paths}
    result: Result = {kind: {} for kind in paths}
    async with AsyncExitStack() as open_pages:
        for kind, path in paths.items():
            await open_pages.enter_async_context(listening(heard[kind], served.url, path))
        await eventually(lambda: all(one.events for one in heard.values()), "the first events")
        for kind, one in heard.items():
            result[kind]["opening_bytes"] = one.bytes
        await asyncio.sleep(seconds)
        for kind, one in heard.items():
            result[kind]["bytes_a_second"] = one.bytes / seconds
            result[kind] |= {"events": one.events, "steps": one.steps.get(first, 0)}
    state = await asyncio.to_thread(served.job, first)
    assert state["status"] == "PROCESSING", "it has to run all the while: fewer --seconds"
    result["crowd"] = await cores(served, visible(ids), pages, seconds)
    return result


async def cores(served: Served, path: str, pages: int, seconds: float) -> Result:
    """The server's CPU while so many pages listen."""
    crowd = [Heard() for _ in range(pages)]
    async with AsyncExitStack() as all_of_them:
        for heard in crowd:
            await all_of_them.enter_async_context(listening(heard, served.url, path))
        await eventually(lambda: all(heard.events for heard in crowd), "everybody's first event")
        cpu, began = cpu_seconds(served.process.pid), time.perf_counter()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - began
        cpu = cpu_seconds(served.process.pid) - cpu
    return {"pages": pages, "cores": cpu / took, "least_events": min(one.events for one in crowd)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.events")
    parser.add_argument("--waiting", default="1,200,1000", help="jobs that wait, with commas")
    parser.add_argument("--pages", type=int, default=100, help="that listen at a time")
    parser.add_argument("--seconds", type=float, default=16.0, help="that each part is measured")
    parser.add_argument("--engine", choices=("faked", "embedded"), default="faked")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results/events.json"))
    arguments = parser.parse_args()
    results: Result = {"machine": machine(), "engine": arguments.engine, "load": os.getloadavg()}
    counts = [int(count) for count in arguments.waiting.split(",")]
    for waiting in counts:
        with ExitStack() as ending:
            folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="mochi-events-"))
            served, ids = started(Path(folder) / "data", arguments.engine, waiting + 1)
            ending.callback(served.end)
            results[waiting] = asyncio.run(measure(served, ids, arguments.pages, arguments.seconds))
    rows = [
        (
            f"{waiting} waiting, {kind}",
            f"{one['bytes_a_second']:.0f}",
            str(one["opening_bytes"]),
            str(one["events"]),
            str(one["steps"]),
        )
        for waiting in counts
        for kind in ("visible", "hidden", "script")
        for one in [results[waiting][kind]]
    ]
    heads = ("a page", "bytes a second", "its opening", "events", "steps told")
    table(f"/events, {arguments.seconds:g} s each, the opening included", heads, rows)
    crowds = [
        (f"{waiting} waiting", str(one["pages"]), f"{one['cores']:.2f}", str(one["least_events"]))
        for waiting in counts
        for one in [results[waiting]["crowd"]]
    ]
    table("Many visible pages", ("", "pages", "server's cores", "events, at least"), crowds)
    results["targets"] = [
        {
            "name": f"{kind} page, {waiting} waiting",
            "bytes_a_second": (found := results[waiting][kind]["bytes_a_second"]),
            "most": most,
            "met": found <= most,
        }
        for waiting in counts
        for kind, most in MOST.items()
    ]
    missed = [one["name"] for one in results["targets"] if not one["met"]]
    print(f"\ntargets missed: {', '.join(missed) or 'none'}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
