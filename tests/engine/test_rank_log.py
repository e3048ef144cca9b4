"""What a rank's process writes to the log, with libraries that complain as they are imported."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app.logs import level_of
from tests.children import Child
from tests.serving import Served

# A library that complains in every way there is, but for an error that nobody may miss.
PROGRAM = """
import logging, os, sys, warnings
from types import SimpleNamespace
from mochi_app.engine import rank

def load(config, emit):
    logging.getLogger("torchao").warning("Failed to load torchao/_C.so: no such symbol")
    own = logging.getLogger("stranger")
    own.propagate = False
    own.addHandler(logging.StreamHandler())
    own.warning("a stranger's warning\\nof two lines")
    own.info("a stranger's information")
    own.error("a stranger's error")
    warnings.warn("a stranger's deprecation", DeprecationWarning)
    warnings.warn("a stranger's user warning")
    logging.getLogger("mochi_app.engine.loading").warning("a warning of ours")
    os.write(2, b"a native line\\n")
    return SimpleNamespace(device="fake", versions={})

sys.exit(rank.main(loader=load))
"""


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`told(**configuration)`: the stderr of a rank that has started."""
    children: list[Child] = []

    def start(program: str = PROGRAM, **configuration: Any) -> str:
        script = tmp_path / "program.py"
        script.write_text(program)
        children.append(Child([str(script)], tmp_path))
        children[-1].config = replace(children[-1].config, **configuration)
        children[-1].start()
        return children[-1].stderr()

    yield start
    for child in children:
        child.kill()


def test_a_librarys_warnings_are_not_told_and_its_errors_are(told: Callable[..., str]) -> None:
    said = told()
    assert "ERROR a stranger's error" in said
    assert "WARNING a warning of ours" in said
    assert "a native line" in said
    for quiet in ("torchao", "stranger's warning", "information", "deprecation", "user warning"):
        assert quiet not in said


def test_at_debug_level_they_are_told_on_one_line_each(told: Callable[..., str]) -> None:
    said = told(log_level="debug")
    assert "DEBUG a stranger's warning of two lines\n" in said
    assert "DEBUG Failed to load torchao" in said
    warned = [line for line in said.splitlines() if "user warning" in line]
    assert {level_of(line) for line in warned} == {logging.DEBUG}


def test_who_asked_for_int8_hears_of_torchao(told: Callable[..., str]) -> None:
    said = told(quantization="int8")
    assert "WARNING Failed to load torchao" in said
    assert "stranger's warning" not in said


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_second_library_is_quiet_in_a_real_rank(tmp_path: Path) -> None:
    child = Child(["-m", "mochi_app.engine.rank"], tmp_path)
    try:
        child.start()
        said = child.stderr()
    finally:
        child.kill()
    assert "torchao" not in said
    assert "_pytree" not in said
    assert [line for line in said.splitlines() if level_of(line) >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("2026-11-26 13:53:51,322 DEBUG Failed", logging.DEBUG),
        ("2026-11-26 13:53:51,322 WARNING it is ours", logging.WARNING),
        ("2026-11-26 13:53:51,322 ERROR Failed", logging.ERROR),
        ("W1126 13:42:34.830000 12839 torch/utils/_pytree.py:630] an enum", logging.DEBUG),
        ("[W1126 13:42:34.830000 socket.cpp:697] no address", logging.DEBUG),
        ("[E1126 13:42:34.830000 ProcessGroup.cpp:1] lost a peer", logging.ERROR),
        ("/a/b.py:3: FutureWarning: soon", logging.DEBUG),
        ("host:1:2 [0] NCCL WARN a cable is out", logging.INFO),
        ("Segmentation fault", logging.INFO),
        ("", logging.INFO),
    ],
)
def test_a_childs_line_has_the_level_that_it_tells(line: str, level: int) -> None:
    assert level_of(line) == level


@pytest.mark.parametrize(("level", "heard"), [("info", False), ("debug", True)])
def test_the_servers_log_has_them_at_debug_level_only(
    tmp_path: Path, level: str, heard: bool
) -> None:
    served = Served(tmp_path / "data", MOCHI_LOG_LEVEL=level)
    try:
        log = served.start().ready().log.read_text()
    finally:
        served.end()
    installed = importlib.util.find_spec("torchao") is not None
    assert ("torchao" in log) is (heard and installed)
    assert "rank 0 ready" in log
    assert " WARNING " not in log
