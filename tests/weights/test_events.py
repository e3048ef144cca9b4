"""What the child says on its lines."""

from __future__ import annotations

import pytest

from mochi_app.weights.events import (
    Done,
    Event,
    Failure,
    Notice,
    Progress,
    decode,
    encode,
    progress_text,
)


# Texts
@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (12_300_000_000, 31_000_000_000, "downloading 12.3 of 31.0 GB"),
        (0, 31_000_000_000, "downloading 0.0 of 31.0 GB"),
        (1_500_000, 25_283_446, "downloading 1.5 of 25.3 MB"),
    ],
)
def test_progress_is_told_in_decimal_units_of_the_total(done: int, total: int, text: str) -> None:
    assert progress_text(Progress(done, total, "")) == text


@pytest.mark.parametrize(
    "event", [Progress(1, 2, "vae/x"), Notice("n"), Done("/f"), Failure("e", True)]
)
def test_an_event_survives_its_line(event: Event) -> None:
    assert encode(event).count("\n") == 1
    assert decode(encode(event)) == event


@pytest.mark.parametrize("line", ["", "Fetching 3 files", "[1]", "{}", '{"a": 1}', "7"])
def test_what_a_library_prints_is_no_event(line: str) -> None:
    assert decode(line) is None
