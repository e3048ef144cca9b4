"""Every command of the package answers when it is run by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mochi_app.files import PROJECT_DIR


@pytest.mark.parametrize("name", ["store", "history", "weights", "accounts"])
def test_a_command_says_how_it_is_used(name: str) -> None:
    command = [sys.executable, "-m", f"mochi_app.{name}", "--help"]
    said = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout[:6]) == (0, "usage:")
