"""A wall clock that can be set."""

from __future__ import annotations

import time

import pytest

DAY = 25 * 3600.0


class Clock:
    """The wall clock, set by tests, and an hour hand that no setting moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        self.later = 0.0
        wall, steady = time.time, time.monotonic
        monkeypatch.setattr(time, "time", lambda: wall() + self.ahead + self.later)
        self.steady = lambda: steady() + self.later
