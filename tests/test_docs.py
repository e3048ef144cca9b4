"""The documents keep their word: tables, examples, links and names of files are checked here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from mochi_app.files import PROJECT_DIR
from mochi_app.parameters import ASKED
from mochi_app.settings import ENV_PREFIX, Settings
from tests.faults.__main__ import table as fault_table
from tests.serving import Served

DOCS = PROJECT_DIR / "docs"
SETTINGS = DOCS / "settings.md"
API = DOCS / "api.md"
DOCUMENTS = [
    *sorted(PROJECT_DIR.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((PROJECT_DIR / "assets").rglob("*.md")),
]
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
SCHEME = re.compile(r"[a-z]+:")
# `studio/intake.py` in the documents is of mochi_app/, unless it names another folder at the root.
FILE_NAME = re.compile(r"`([\w./-]+\.(?:py|js|css|md|toml|txt|yml))`")


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
    """The table of settings, made from their declarations."""
    rows = [
        f"| `{ENV_PREFIX}{name.upper()}` | {shown_default(name, field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | what it does |", "| --- | --- | --- |", *rows])


def parameters_table() -> str:
    """The table of a request's parameters, made from their declarations, in the API's order."""
    rows = [f"| `{name}` | {declared.help} |" for name, declared in ASKED.items()]
    return "\n".join(["| parameter | what it is |", "| --- | --- |", *rows])


def section(path: Path, name: str) -> str:
    """What stands in a document between `<!-- name -->` and `<!-- /name -->`."""
    text = path.read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def code(path: Path, language: str, under: str) -> str:
    """The first block of that language in a document under that heading."""
    text = path.read_text(encoding="utf-8").split(f"\n## {under}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"{path.name}: no {language} block under {under}"
    return found.group(1)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What a link can name in a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    """The relative links of a document that lead nowhere."""
    dead = []
    for link in LINK.findall(prose(path)):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if SCHEME.match(link):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(link)
    return dead


def missing_files(path: Path) -> list[str]:
    """The files that a document names and the checkout lacks."""
    names = FILE_NAME.findall(prose(path))
    return [
        name
        for name in names
        if not any((root / name).exists() for root in (PROJECT_DIR, PROJECT_DIR / "mochi_app"))
    ]


def test_the_settings_table_is_the_declarations() -> None:
    assert section(SETTINGS, "settings") == settings_table(), "python -m tests.test_docs writes it"


def test_the_parameters_table_is_the_declarations() -> None:
    assert section(API, "parameters") == parameters_table(), "python -m tests.test_docs writes it"


def test_the_readmes_settings_are_rows_of_the_table() -> None:
    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    shown = [line for line in readme.splitlines() if line.startswith(f"| `{ENV_PREFIX}")]
    assert len(shown) == 5
    assert set(shown) <= set(settings_table().splitlines())


def test_the_example_of_an_environment_names_settings() -> None:
    example = (PROJECT_DIR / ".env.example").read_text(encoding="utf-8")
    names = re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert names
    assert set(names) - known == {"GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"}


def test_the_reliability_table_is_the_fault_matrix() -> None:
    assert section(DOCS / "reliability.md", "faults") == fault_table(), (
        "python -m tests.faults writes it"
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT_DIR)))
def test_links_between_the_documents_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT_DIR)))
def test_the_files_that_the_documents_name_exist(path: Path) -> None:
    assert missing_files(path) == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Here it is\n[a](#here-it-is) [b](#gone) [c](page.md#here-it-is) [d](none.md)"
        " [e](https://mochi.example/none) ![f](none.png)\n```\n[g](none)\n```\n`no/where.py`\n"
    )
    assert dead_links(page) == ["#gone", "none.md", "none.png"]
    assert missing_files(page) == ["no/where.py"]


@pytest.mark.parametrize(
    ("path", "under"), [("docs/api.md", "Python"), ("README.md", "From a program")]
)
def test_the_python_examples_run(app: Served, path: str, under: str) -> None:
    example = code(PROJECT_DIR / path, "python", under)
    done = subprocess.run(
        [sys.executable, "-c", example.replace("http://127.0.0.1:7860", app.url)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert ".mp4" in done.stdout
    assert ("COMPLETED 8 of 8" in done.stdout) == (path == "docs/api.md")


def test_the_shell_example_runs(app: Served, tmp_path: Path) -> None:
    example = code(DOCS / "api.md", "bash", "curl")
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


def rewrite(path: Path, name: str, content: str) -> None:
    """Put `content` between `<!-- name -->` and `<!-- /name -->` in a document."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    path.write_text(
        f"{before}<!-- {name} -->\n{content}\n<!-- /{name} -->{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    rewrite(SETTINGS, "settings", settings_table())
    rewrite(API, "parameters", parameters_table())
