"""The page's scripts: how they are served, what they import, and node's tests of their logic."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mochi_app.files import PROJECT_DIR
from mochi_app.web import ui
from mochi_app.web.page_files import FOLDER, PAGE_FILES, PageFiles
from tests.asgi import Web

IMPORT = re.compile(r'^(?:import|export)\b[^;]*"\./([\w.]+)";$', re.MULTILINE)
SRC = re.compile(r'src="(\./page/[^"]+)"')
HREF = re.compile(r'href="(\./page/[^"]+)"')


def test_nodes_own_tests_pass() -> None:
    """Those of `tests/js`, which are told Python's side of what both must agree on."""
    node = shutil.which("node")
    assert node, "node not found: pip install -r requirements-dev.txt"
    nobody: Any = SimpleNamespace()
    python = {
        "filters": list(ui.FILTERS),
        "calls": [call.__name__ for call in ui.Calls(nobody).all()],
        "fields": ui.FORM_FIELDS,
        "details": ui.details(),
    }
    tests = sorted(map(str, (PROJECT_DIR / "tests" / "js").glob("*.test.js")))
    assert tests
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", *tests],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MOCHI_PYTHON": json.dumps(python)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# skipped 0" in done.stdout, done.stdout


def circle(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The modules that import themselves by way of others, and whatever leads to them."""
    tied = dict(imports)
    while free := [name for name, others in tied.items() if not others & tied.keys()]:
        for name in free:
            del tied[name]
    return tied


def test_no_module_imports_itself_by_way_of_others() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")}
    imports = {name: set(IMPORT.findall(text)) for name, text in texts.items()}
    assert {"stream.js", "panel.js", "gallery.js", "form.js"} <= imports["main.js"]
    assert set().union(*imports.values()) <= texts.keys()
    assert circle(imports) == {}


def test_a_circle_is_noticed() -> None:
    assert circle({"a.js": {"b.js"}, "b.js": {"c.js"}, "c.js": {"b.js"}, "d.js": set()}).keys() == {
        "a.js",
        "b.js",
        "c.js",
    }


async def test_the_scripts_may_be_kept_for_good_and_belong_together(web: Web) -> None:
    running = await web()
    config = (await running.client.get("/config")).json()
    (main,) = SRC.findall(config["head"])
    named = HREF.findall(config["head"])
    folder = main.rpartition("/")[0]
    assert {path.name for path in FOLDER.glob("*.js")} == {
        path.removeprefix(f"{folder}/") for path in named
    }
    for path in (main, *named):  # relative, for a page under a prefix
        answer = await running.client.get(path.removeprefix("."))
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        assert answer.content == (FOLDER / Path(path).name).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/page/0123456789abcdef/main.js",
        "/page/HASH/page_files.py",
        "/page/HASH/..%2Fpage.css",
        "/page/HASH/../page.css",
        "/page/HASH/",
        "/page/HASH",
        "/page/main.js",
    ],
)
async def test_nothing_else_is_served(web: Web, path: str) -> None:
    running = await web()
    answer = await running.client.get(path.replace("HASH", PAGE_FILES.version))
    assert answer.status_code == 404
    assert "immutable" not in answer.headers.get("cache-control", "")


def test_another_text_or_name_is_another_version(tmp_path: Path) -> None:
    versions = []
    for name, text in (("a.js", "1"), ("a.js", "2"), ("b.js", "2")):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_text(text)
        versions.append(PageFiles(tmp_path).version)
    assert len(set(versions)) == 3
    assert PageFiles(tmp_path).version == versions[-1]


async def test_strangers_get_no_scripts(web: Web, auth_file: Path) -> None:
    running = await web(auth_file=auth_file)
    answer = await running.client.get(f"/page/{PAGE_FILES.version}/main.js")
    assert answer.status_code == 401
