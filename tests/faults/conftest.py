"""Every test of this folder is a case of the fault matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.serving import Served

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(behaviour="", **settings)`: a started server over this test's data folder.

    With a behaviour its ranks are those of tests/engines/fake.py; else the embedded model's.
    """
    started: list[Served] = []

    def start(behaviour: str = "", **settings: str) -> Served:
        program = ("-m", "tests.faults.server", behaviour) if behaviour else ("app.py",)
        served = Served(tmp_path / "data", program=program, **settings)
        started.append(served)
        return served.start()

    yield start
    for served in started:
        served.end()
