"""What is news of a job."""

from __future__ import annotations

from typing import Any

import pytest

from mochi_app.studio.live import is_news


@pytest.mark.parametrize(
    ("before", "after", "seconds", "news"),
    [
        (100.0, 70.0, 30, False),  # as it was to be
        (100.0, 64.0, 30, False),  # near enough
        (100.0, 60.0, 30, True),  # sooner
        (100.0, 80.0, 30, True),  # later
        (5.0, 0.0, 30, False),  # any moment now
        (5.0, 3.5, 0, False),
        (None, None, 30, False),
        (None, 5.0, 0, True),
        (5.0, None, 0, True),
    ],
)
def test_an_eta_that_runs_down_is_none(
    before: float | None, after: float | None, seconds: float, news: bool
) -> None:
    assert is_news(progress(before), progress(after), seconds) == news


def test_whatever_else_changes_is() -> None:
    assert is_news(progress(100.0), progress(100.0) | {"step": 2}, 0)
    assert is_news(progress(100.0), progress(100.0) | {"held": "why"}, 0)
    assert not is_news(progress(100.0), progress(100.0), 0)


def progress(eta: float | None) -> dict[str, Any]:
    return {"id": "a", "step": 1, "eta_seconds": eta}
