"""The real app as a process of its own, for tests that come in through a door."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client

from mochi_app.files import PROJECT_DIR

DEADLINE = 60.0  # seconds


# Below those that the system takes for connections: what is free stays free until it is used. They
# are drawn, so that tests which run at the same time hardly ever find the same one.
PORTS = range(10_000, 32_000)


def free_port() -> int:
    """A port that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no free port among a hundred of {PORTS}")


def poll(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Call until the result is true, and return it."""
    limit = time.monotonic() + deadline
    while time.monotonic() < limit:
        if value := condition():
            return value
        time.sleep(0.03)
    raise AssertionError(f"{what} did not come true within {deadline:g} s")


class Served:
    """`python app.py` on a free port of 127.0.0.1 over a data folder that outlives it."""

    def __init__(
        self, data_dir: Path, *, program: Sequence[str] = ("app.py",), **settings: str
    ) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self._program = program
        self._settings = settings
        self.headers: dict[str, str] = {}  # what every call of ours sends along
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running server."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def memory_mib(self) -> float:
        """What the server's process keeps in memory of its own, without the files it has mapped:
        those come and go as the system likes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def start(self) -> Served:
        """Start the server; returns once it answers, which is before its model is loaded."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOCHI_", "GRADIO_"))
        }
        own = {
            "MOCHI_DATA_DIR": str(self.data_dir),
            "GRADIO_SERVER_PORT": str(self.port),
            "GRADIO_SERVER_NAME": "127.0.0.1",
        }
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._program],
                cwd=PROJECT_DIR,
                env=inherited | own | self._settings,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        poll(self._answers, "an answer of the server")
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
        try:
            return httpx.get(f"{self.url}/livez", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def ready(self) -> Served:
        """Wait until a video could be made."""
        poll(lambda: httpx.get(f"{self.url}/healthz").status_code == 200, "readiness")
        return self

    def slots(self) -> list[dict[str, Any]]:
        """State of the slots."""
        found: list[dict[str, Any]] = self.get("/healthz").json()["slots"]
        return found

    def pids(self) -> list[int]:
        """Process ids of all ranks."""
        return [pid for slot in self.slots() for pid in slot["pids"]]

    def client(self) -> Client:
        """A Gradio client of this server."""
        return Client(self.url, verbose=False, headers=self.headers)

    def get(self, path: str) -> httpx.Response:
        """GET a path."""
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=DEADLINE)

    def call(self, name: str, **parameters: Any) -> Any:
        """One call over plain HTTP, as curl would make it: post, then read the event stream.

        Raises:
            Refusal: the endpoint answered with an error.
        """
        base = f"{self.url}/gradio_api/call"
        posted = httpx.post(
            f"{base}/v2/{name}", json=parameters, headers=self.headers, timeout=DEADLINE
        )
        posted.raise_for_status()
        stream = self.get(f"/gradio_api/call/{name}/{posted.json()['event_id']}")
        event, data = stream.text.strip().split("\n\n")[-1].split("\n", 1)
        payload = httpx.Response(200, content=data.removeprefix("data: ")).json()
        if event != "event: complete":
            raise Refusal(str(payload["error"] if isinstance(payload, dict) else payload))
        return payload[0]

    def job(self, job_id: str) -> dict[str, Any]:
        """The job's status."""
        found: dict[str, Any] = self.call("get_job_status", job_id=job_id)
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job once it has come to its end."""

        def look() -> dict[str, Any] | None:
            view = self.job(job_id)
            return view if view["status"] in ("COMPLETED", "FAILED", "CANCELLED") else None

        found: dict[str, Any] = poll(look, f"the end of job {job_id}")
        return found

    def running(self, job_id: str, step: int = 1) -> None:
        """Wait until the job has done `step` steps."""
        poll(lambda: self.job(job_id)["step"] >= step, f"step {step} of job {job_id}")

    def waits(self, job_id: str, reason: str = "") -> str:
        """Wait until the job tells why it waits, with `reason` in it; what it tells."""

        def look() -> str | None:
            told: str = self.job(job_id)["waits_for"] or ""
            return told if reason in told else None

        told: str = poll(look, f"a reason of job {job_id} to wait: {reason}")
        return told

    def terminate(self, timeout: float = 15) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End it however it stands."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.terminate()
            except subprocess.TimeoutExpired:
                self.kill()


class Refusal(Exception):
    """An endpoint's error message."""
