"""What keeps the app from starting at all is told in one line, by the real program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mochi_app import __version__
from mochi_app.files import PROJECT_DIR
from tests.serving import Served

NO_TEMPORARY = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/nowhere/tmp']\n"
WINDOWS = """
import importlib.abc, sys

MISSING = ("fcntl", "resource")

class Windows(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mochi_app":  # not before: the standard library would look for more of Windows
            sys.platform = "win32"
            for missing in MISSING:
                sys.modules.pop(missing, None)
        if name in MISSING and sys.platform == "win32":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Windows())
"""


def site(folder: Path, code: str) -> dict[str, str]:
    """An environment in which each Python process begins with `code`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def run(*words: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of the program."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=PROJECT_DIR,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", [("app.py",), ("-m", "mochi_app")], ids=" ".join)
def test_without_a_temporary_folder_one_line_names_tmpdir(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    status, said = run(*words, **site(tmp_path / "site", NO_TEMPORARY))
    assert status == 2
    assert said.count("\n") == 1
    assert "TMPDIR" in said
    assert "/nowhere/tmp" in said


@pytest.mark.parametrize("words", [("app.py",), ("-m", "mochi_app")], ids=" ".join)
def test_words_on_the_command_line_start_no_server(words: tuple[str, ...]) -> None:
    assert run(*words, "--version") == (0, f"mochi-studio {__version__}\n")
    status, said = run(*words, "--port", "7861")
    assert status == 2
    assert "--port 7861" in said
    assert "GRADIO_SERVER_PORT" in run(*words, "--help")[1]


READ_ONLY = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
mkdir "$1/tmp"
mount -o remount,bind,ro /
"$2" app.py && exit 1 || test $? = 2
TMPDIR="$1/tmp" exec "$2" -m tests.test_startup
"""


def test_a_read_only_system_needs_tmpdir_and_a_data_folder_only(tmp_path: Path) -> None:
    """In a mount namespace of its own, where root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(disk), sys.executable],
        cwd=PROJECT_DIR,
        env=os.environ | {"MOCHI_DATA_DIR": str(disk / "data"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    if "unshare: unshare failed" in done.stderr or "mount: " in done.stderr:
        pytest.skip(done.stderr)
    first, *_ = done.stderr.splitlines()
    assert "TMPDIR" in first
    assert done.stdout.split() == ["COMPLETED"], done.stderr


def make_a_preview() -> None:
    """What the test above runs on the read-only system."""
    served = Served(Path(os.environ["MOCHI_DATA_DIR"]), MOCHI_NUM_FRAMES="7")
    try:
        job = served.start().ready().call("submit_job", prompt="a red circle", seed=1)
        sys.stdout.write(f"{served.ended(job['id'])['status']}\n")
    finally:
        served.end()


@pytest.mark.parametrize(
    "words",
    [("app.py",), ("-m", "mochi_app")]
    + [("-m", f"mochi_app.{name}") for name in ("accounts", "history", "engine.rank")],
    ids=" ".join,
)
def test_windows_is_told_in_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    status, said = run(*words, **site(tmp_path / "site", WINDOWS))
    assert status == 2
    assert said.count("\n") == 1
    assert "WSL" in said


if __name__ == "__main__":
    make_a_preview()
