"""Weights as the child process fetches them from a stand-in hub."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mochi_app.files import PROJECT_DIR
from mochi_app.weights.events import (
    Done,
    Event,
    Failure,
    Notice,
    Progress,
    decode,
)
from mochi_app.weights.fetch import WEIGHTS_COMMAND
from mochi_app.weights.files import (
    PartTypes,
)
from tests.hub import REPO, folder_files
from tests.places import TINY

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

VAE = "vae/diffusion_pytorch_model.safetensors"

TEXT_ENCODER = "text_encoder/model.safetensors"

MB = 1_000_000

FLOAT32 = PartTypes("float32", "float32", "float32")

BFLOAT16 = PartTypes("bfloat16", "bfloat16", "bfloat16")


@dataclass
class Outcome:
    """A finished run of the command."""

    code: int
    events: list[Event]
    seconds: float
    stderr: str
    notices: list[str] = field(init=False)
    progress: list[Progress] = field(init=False)

    def __post_init__(self) -> None:
        self.notices = [event.text for event in self.events if isinstance(event, Notice)]
        self.progress = [event for event in self.events if isinstance(event, Progress)]

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        last = self.events[-1]
        assert isinstance(last, Done), (self.events, self.stderr)
        assert self.code == 0
        return Path(last.folder)

    @property
    def failure(self) -> Failure:
        """Why there are none."""
        last = self.events[-1]
        assert isinstance(last, Failure), (self.events, self.stderr)
        assert self.code == 1
        return last


def command(model: str = REPO, dtype: str = "float32", *extra: str) -> list[str]:
    return [*WEIGHTS_COMMAND, "--model", model, "--dtype", dtype, *extra]


def run(model: str = REPO, dtype: str = "float32", *extra: str, **environment: str) -> Outcome:
    """The command, to its end."""
    started = time.monotonic()
    process = subprocess.run(
        command(model, dtype, *extra),
        env=os.environ | environment,
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        timeout=30,
    )
    events = [event for line in process.stdout.splitlines() if (event := decode(line))]
    return Outcome(process.returncode, events, time.monotonic() - started, process.stderr)


@cache
def tiny_files() -> dict[str, bytes]:
    return folder_files(TINY)
