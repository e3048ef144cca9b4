"""Tries of a password, and whose they are."""

from __future__ import annotations

import pytest
from starlette.requests import HTTPConnection

from mochi_app.web import throttle as throttles
from mochi_app.web.throttle import Throttle, address_of


def test_tries_run_out_and_come_back() -> None:
    now = 0.0
    throttle = Throttle(tries=2, seconds=8, clock=lambda: now)
    assert [throttle.take("a"), throttle.take("a")] == [0, 0]
    assert throttle.take("a") == 8
    assert throttle.take("b") == 0
    throttle.give_back("b")
    assert [throttle.take("b"), throttle.take("b")] == [0, 0]
    now = 4.0
    assert throttle.take("a") == 4
    now = 8.0
    assert [throttle.take("a"), throttle.take("a")] == [0, 8]


def test_many_addresses_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttles, "MAX_ADDRESSES", 3)
    throttle = Throttle()
    for number in range(10):
        throttle.take(str(number))
    assert len(throttle._spent) == 3


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.1", "10.0.0.1"), ("2001:db8::1:2", "2001:db8::/64"), ("unix", "unix"), (None, "")],
)
def test_an_address_is_a_client(host: str | None, address: str) -> None:
    scope = {"type": "http", "client": host and (host, 1)}
    assert address_of(HTTPConnection(scope)) == address
