"""The README keeps its word: its settings, its commands and its examples are checked here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from mochi_app.files import PROJECT_DIR
from mochi_app.settings import ENV_PREFIX, Settings
from tests.faults.__main__ import table as fault_table
from tests.serving import Served

README = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")


def shown_default(name: str, field: FieldInfo) -> str:
    """A setting's default as the table shows it."""
    default: Any = field.default
    if name == "model":
        return "`assets/tiny-mochi`"
    if name in ("lora_dir", "auth_file", "api_token") or default in ((), ""):
        return "none"
    if default is None:
        return "the model's"
    if isinstance(default, tuple):
        return f"`{';'.join(map(str, default))}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def settings_table() -> str:
    """The README's table of settings, made from their declarations."""
    rows = [
        f"| `{ENV_PREFIX}{name.upper()}` | {shown_default(name, field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | what it does |", "| --- | --- | --- |", *rows])


def section(name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def code(language: str, under: str) -> str:
    """The first block of that language under that heading."""
    text = README.split(f"## {under}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"no {language} block under {under}"
    return found.group(1)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("readme") / "data").start()
    yield served
    served.end()


def test_the_settings_table_is_the_declarations() -> None:
    assert section("settings") == settings_table(), "python -m tests.test_readme rewrites it"


def test_the_reliability_table_is_the_fault_matrix() -> None:
    assert section("faults") == fault_table(), "python -m tests.faults rewrites it"


def test_what_the_readme_shows_exists() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (PROJECT_DIR / path).is_file(), path


def test_the_python_example_runs(app: Served) -> None:
    example = code("python", "From Python and from the shell")
    done = subprocess.run(
        [sys.executable, "-c", example.replace("http://127.0.0.1:7860", app.url)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert ".mp4" in done.stdout
    assert "COMPLETED 8 of 8" in done.stdout


def test_the_shell_example_runs(app: Served, tmp_path: Path) -> None:
    example = code("bash", "From Python and from the shell")
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", example.replace("http://127.0.0.1:7860", app.url)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PATH": search},
    )
    assert done.returncode == 0, done.stderr
    assert "event: complete" in done.stdout
    assert app.call("list_jobs", query="yellow ring")["total"] == 1


if __name__ == "__main__":
    before, rest = README.split("<!-- settings -->\n")
    after = rest.split("<!-- /settings -->")[1]
    (PROJECT_DIR / "README.md").write_text(
        f"{before}<!-- settings -->\n{settings_table()}\n<!-- /settings -->{after}",
        encoding="utf-8",
    )
