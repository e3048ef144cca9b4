"""Gradio's own JavaScript client, run by node against a real server with a login."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mochi_app import accounts
from mochi_app.files import PROJECT_DIR
from tests.serving import DEADLINE, Served
from tests.test_docs import code

FOLDER = Path(__file__).parent / "js"
TOKEN = "the token of this test's machine"


@pytest.fixture(scope="module")
def node() -> str:
    """The node program, with the packages of tests/js/package-lock.json beside the scripts."""
    programs = {name: shutil.which(name) or "" for name in ("node", "npm")}
    missing = [name for name, found in programs.items() if not found]
    if missing:
        pytest.fail(f"{' and '.join(missing)} not found: pip install -r requirements-dev.txt")
    installed = FOLDER / "node_modules" / ".package-lock.json"
    lock = FOLDER / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        npm = [programs["npm"], "ci"]
        done = subprocess.run(npm, cwd=FOLDER, capture_output=True, text=True, timeout=150)
        if done.returncode:
            pytest.fail(f"npm ci in {FOLDER} failed:\n{done.stderr}")
    return str(programs["node"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on which Ann has an account, and a machine a token."""
    folder = tmp_path_factory.mktemp("javascript")
    accounts.add(folder / "accounts", "ann", "ann's pässword", admin=False)
    server = Served(
        folder / "data",
        program=("-m", "tests.faults.server", "ok"),
        MOCHI_AUTH_FILE=str(folder / "accounts"),
        MOCHI_API_TOKEN=TOKEN,
    )
    yield server.start().ready()
    server.end()


def run(node: str, *arguments: str) -> dict[str, Any]:
    """What the script printed."""
    command = [node, str(FOLDER / "generate.mjs"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.stdout, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.parametrize(
    ("known", "owner"), [(("ann", "ann's pässword"), "ann"), (("--token", TOKEN), "api")]
)
def test_it_logs_in_submits_streams_and_downloads(
    node: str, served: Served, known: tuple[str, str], owner: str
) -> None:
    printed = run(node, served.url, *known)
    assert printed.get("error") is None
    assert printed["job"]["owner"] == owner
    assert printed["asked"] == printed["job"]["id"]
    assert {status for status, _ in printed["streamed"]} <= {"PENDING", "PROCESSING"}
    assert printed["streamed"], "no progress was streamed"
    assert printed["file"] == [200, "ftyp"]
    assert printed["stranger"] == 401


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (("ann", "wrong"), "Invalid credentials. Could not login. "),
        (("nobody", "ann's pässword"), "Invalid credentials. Could not login. "),
        ((), "Login credentials are required to access this space."),
    ],
)
def test_it_says_clearly_who_stays_outside(
    node: str, served: Served, known: tuple[str, ...], told: str
) -> None:
    assert run(node, served.url, *known) == {"error": told}


def test_the_example_of_the_api_document_runs(node: str, served: Served) -> None:
    example = code(PROJECT_DIR / "docs" / "api.md", "javascript", "JavaScript")
    known = json.dumps(["ann", "ann's pässword"])
    program = example.replace("http://127.0.0.1:7860", served.url).replace(
        "{ events:", f"{{ auth: {known}, events:"
    )
    done = subprocess.run(
        [node, "--input-type=module", "--eval", program],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    status, *progress, video = done.stdout.splitlines()
    assert status in ("PENDING", "PROCESSING", "COMPLETED")
    assert all(": step " in line for line in progress), done.stdout
    assert f"{served.url}/" in video
    assert ".mp4" in video
