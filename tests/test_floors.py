"""The floors of the house: imports point down only, and in no circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from mochi_app.files import PROJECT_DIR

# From the top down. A module imports from its own floor and from those below it; what stands side
# by side on a line knows nothing of each other.
FLOORS = (
    {"start"},
    {"web"},
    {"studio"},
    {"store", "slots"},
    {"engine"},
    {"weights"},
    {"plain"},
)
START = {"mochi_app.app", "mochi_app.__main__"}  # the composition root, and what runs it
APART = "tiny"  # tied to nothing, and nothing to it
PACKAGE = PROJECT_DIR / "mochi_app"
MOST_LINES = 400  # of a file: what is longer is two rooms


def floor_of(module: str) -> str:
    """The floor of a dotted name: the composition root, the folder, or plain data."""
    if any(module == name or module.startswith(f"{name}.") for name in START):
        return "start"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "plain"


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(path.relative_to(PROJECT_DIR).with_suffix("").parts)
        found[dotted.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in the file."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(floor: str) -> int:
    """How many floors lie above."""
    return next(i for i, names in enumerate(FLOORS) if floor in names)


def upward(module: str, path: Path) -> list[str]:
    """What a module imports that it should not."""
    here = floor_of(module)
    there = [name for name in imports(path) if name.split(".")[0] == "mochi_app"]
    if here == APART:
        return [name for name in there if floor_of(name) != APART]
    return [
        name
        for name in there
        if floor_of(name) != here
        and (floor_of(name) == APART or level(floor_of(name)) <= level(here))
    ]


@pytest.mark.parametrize("module", [name for name in modules() if name != "mochi_app.history"])
def test_imports_point_down(module: str) -> None:
    assert upward(module, modules()[module]) == []


def test_a_module_that_looks_up_is_noticed(tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text("def late():\n    from mochi_app.studio.studio import Studio\n")
    assert upward("mochi_app.store.stray", stray) == ["mochi_app.studio.studio"]
    stray.write_text("import mochi_app.slots.pool\nfrom mochi_app import jobs\n")
    assert upward("mochi_app.store.stray", stray) == ["mochi_app.slots.pool"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    tied = {
        name: set(imports(path)) & modules().keys() - {name} for name, path in modules().items()
    }
    while free := [name for name, others in tied.items() if not others & tied.keys()]:
        for name in free:
            del tied[name]
    assert tied == {}


def test_no_file_is_too_long() -> None:
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
