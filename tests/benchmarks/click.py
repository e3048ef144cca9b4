"""Seconds from a click in the browser to a video that plays: a preview, then its enhance.

    python -m tests.benchmarks.click [--rounds N] [--output benchmark-results/click.json]

A real server with the embedded model and its default settings, Debian's chromium on the same
cores. The clock starts at the click and stops when the video element has its first frame.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.benchmarks.report import table
from tests.browsing import CHROMIUM, CHROMIUM_ARGS, PROMPT, tile
from tests.serving import Served

PROMPTS = (
    "a red circle moving left on a blue background",
    "a big yellow square growing on a purple background",
    "a small white triangle moving up on a green background",
    "a blue ring shrinking on an orange background",
    "a black square standing still on a yellow background",
)
PATIENCE = 120_000  # milliseconds


def click_to_video(page: Page, button: str, name: str) -> float:
    """Seconds from a click on `button` to the first frame in the tile whose name begins so."""
    began = time.perf_counter()
    page.click(button)
    video = tile(page, name).locator("video").element_handle(timeout=PATIENCE)
    page.wait_for_function("video => video.readyState >= 2", arg=video, timeout=PATIENCE)
    return time.perf_counter() - began


def measure(url: str, rounds: int) -> dict[str, list[float]]:
    """Each round with a prompt of its own in a page of its own; the first round is not counted."""
    seconds: dict[str, list[float]] = {"preview": [], "enhance": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[*CHROMIUM_ARGS, "--autoplay-policy=no-user-gesture-required"],
        )
        for number in range(rounds + 1):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(url)
            page.wait_for_selector("#mochi-gallery .m-gallery")
            page.fill(PROMPT, PROMPTS[number % len(PROMPTS)])
            preview = click_to_video(page, "#mochi-generate", "Preview")
            enhance = click_to_video(page, "[data-action=enhance]", "Enhanced")
            if number:
                seconds["preview"].append(preview)
                seconds["enhance"].append(enhance)
            page.close()
        browser.close()
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results/click.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Served(Path(folder) / "data").start().ready()
        try:
            seconds = measure(f"{server.url}/", arguments.rounds)
        finally:
            server.end()
    rows = [
        (name, f"{statistics.median(one):.2f}", f"{min(one):.2f}", f"{max(one):.2f}")
        for name, one in seconds.items()
    ]
    table("Click to video, seconds", ("", "median", "shortest", "longest"), rows)
    load = os.getloadavg()
    print(f"load {load[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"seconds": seconds, "load": load, "cores": len(os.sched_getaffinity(0))}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
