"""Rate limit for wrong passwords, by address."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.requests import HTTPConnection

TRIES = 10  # wrong passwords that one address may try at once
SECONDS_A_TRY = 20.0  # after which it may try one more
MAX_ADDRESSES = 10_000  # remembered


class Throttle:
    """How many wrong passwords an address may still try: some at once, then one at intervals."""

    def __init__(
        self,
        tries: int = TRIES,
        seconds: float = SECONDS_A_TRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tries = tries
        self._seconds = seconds
        self._clock = clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tries, and when

    def take(self, address: str) -> float:
        """Use up a try. Returns 0, or the seconds until there is one."""
        now = self._clock()
        spent, then = self._spent.pop(address, (0.0, now))
        spent = max(0.0, spent - (now - then) / self._seconds)
        left = self._tries - spent
        self._spent[address] = (spent + 1 if left >= 1 else spent, now)
        while len(self._spent) > MAX_ADDRESSES:
            self._spent.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * self._seconds

    def give_back(self, address: str) -> None:
        """Return a try, after a correct password."""
        spent, then = self._spent.get(address, (0.0, self._clock()))
        self._spent[address] = (max(0.0, spent - 1), then)


def address_of(request: HTTPConnection) -> str:
    """The client's address; for IPv6 its /64 network, since one client has all of it."""
    host = request.client.host if request.client else ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped is not None:
                return str(address.ipv4_mapped)
            return str(ipaddress.ip_network((address, 64), strict=False))
    return host
