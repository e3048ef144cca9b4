"""The two processes that the benchmarks compare: the app as it is started, and a plain pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradio_client import Client

from mochi_app.files import PROJECT_DIR
from tests.serving import Served, poll

SLOT_SECONDS = 300.0  # a slot may take to load, or to fail
STOP_SECONDS = 10.0


@contextmanager
def running_app(data_dir: Path, **settings: str) -> Iterator[Served]:
    """`python app.py` on a free port of this machine only, answering, its slots still loading."""
    app = Served(data_dir, **settings)
    try:
        yield app.start()
    finally:
        app.end()


def wait_for_slots(app: Served, *states: str) -> None:
    """Wait until every slot is in one of these states."""
    poll(
        lambda: all(slot["state"] in states for slot in app.slots()),
        f"slots that are {' or '.join(states)}",
        SLOT_SECONDS,
    )


@contextmanager
def gradio_client(app: Served, folder: Path) -> Iterator[Client]:
    """A Gradio client that puts the videos it fetches into `folder`."""
    client = Client(app.url, verbose=False, download_files=folder, analytics_enabled=False)
    try:
        yield client
    finally:
        client.close()


def unloadable_model(folder: Path) -> Path:
    """A model folder whose sizes are the embedded model's and which cannot be loaded.

    With it a server takes jobs, and none ever runs.
    """
    model = folder / "unloadable"
    model.mkdir(exist_ok=True)
    defaults = PROJECT_DIR / "assets" / "tiny-mochi" / "mochi_defaults.json"
    (model / "mochi_defaults.json").write_bytes(defaults.read_bytes())
    return model


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used, all threads, its children apart."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


class PlainPipeline:
    """The process of `plain.py`, its model loaded."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.threads = int(self._answer()["threads"])

    def make(self, request: dict[str, Any]) -> dict[str, Any]:
        """One video; what `plain.make_video` returns."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the plain pipeline ended:\n{self._log.read_text(errors='replace')[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def plain_pipeline(folder: Path, model: str, threads: int) -> Iterator[PlainPipeline]:
    """A plain pipeline in the environment that a CPU rank of the app has."""
    log = folder / "plain.log"
    chosen = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",  # as mochi_app.engine.rank sets it
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        *(sys.executable, "-m", "tests.benchmarks.plain", "--model", model),
        *("--folder", str(folder / "plain"), "--threads", str(threads)),
    ]
    with (
        log.open("ab") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=PROJECT_DIR,
            env=chosen,
            text=True,
        ) as process,
    ):
        try:
            yield PlainPipeline(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
