"""Whose a job is."""

from __future__ import annotations

import pytest

from mochi_app.callers import Caller


@pytest.mark.parametrize(
    ("caller", "owned"),
    [
        (Caller(), {""}),
        (Caller("ann"), {"", "ann"}),
        (Caller("anon-1"), {"", "anon-1"}),
        (Caller("ada", admin=True), {"", "ann", "bob", "anon-1"}),
    ],
)
def test_what_is_whose(caller: Caller, owned: set[str]) -> None:
    assert {name for name in ("", "ann", "bob", "anon-1") if caller.owns(name)} == owned
