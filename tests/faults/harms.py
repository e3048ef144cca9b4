"""What tests of several harms share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app.files import PROJECT_DIR
from tests.serving import Refusal, Served, free_port

QUICK: dict[str, Any] = {"num_inference_steps": 2}


PROGRAM = ("-m", "tests.faults.server", "ok")


SMALL = {"height": 64, "width": 64, "num_frames": 7}

LARGE = {"height": 192, "width": 192, "num_frames": 61}  # of noise: 1.5 MB, 0.56 reserved


def submit(served: Served, prompt: str, steps: int = 8, **size: int) -> dict[str, Any]:
    """A job, of the smallest size unless told."""
    job: dict[str, Any] = served.call(
        "submit_job", prompt=prompt, num_inference_steps=steps, **(size or SMALL)
    )
    return job


def made(served: Served, prompt: str = "a video", **size: int) -> dict[str, Any]:
    """A finished job."""
    job = served.ended(submit(served, prompt, **size)["id"])
    assert job["status"] == "COMPLETED", job["error"]
    return job


def health(served: Served) -> httpx.Response:
    return httpx.get(f"{served.url}/healthz", timeout=30)


def run(*command: str, data_dir: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A Python program of the project's, run to its end on this data folder."""
    own = {"MOCHI_DATA_DIR": str(data_dir), "GRADIO_SERVER_PORT": str(free_port())}
    return subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT_DIR,
        env=os.environ | own | settings,
        capture_output=True,
        text=True,
        timeout=90,
    )


def refused_start(data_dir: Path) -> str:
    """The one line with which a server refuses to start on this folder."""
    done = run(*PROGRAM, data_dir=data_dir)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot start: " in line]
    return line.split("cannot start: ")[1]


def mounted(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user cannot mount: {done.stderr.strip()}")


def submit_until_refused(served: Served) -> tuple[list[str], str]:
    """Ids of the jobs that were taken, and the refusal: a full disk has room in open files yet."""
    taken = []
    for _ in range(300):
        try:
            taken.append(served.call("submit_job", prompt="more", **QUICK)["id"])
        except Refusal as refusal:
            return taken, str(refusal)
    raise AssertionError("the disk is full and every job was taken")
