"""Accounts for tests, whose passwords cost nothing to check."""

from __future__ import annotations

from mochi_app import accounts
from mochi_app.accounts import PasswordHash

TOKEN = "a token of more than twenty characters"

BEARER = {"authorization": f"Bearer {TOKEN}"}

SALT = b"salt of a test"


def cheap(password: str) -> PasswordHash:
    """A hash that costs nothing to check."""
    return PasswordHash(2, 1, 1, SALT, accounts.derive(password, 2, 1, 1, SALT))
