"""Fixtures of the store's tests: the history of a test, opened and opened again."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mochi_app.store.history import History
from tests.histories import (
    Open,
)


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the history of this test, closing the one before."""
    stack = contextlib.AsyncExitStack()

    async def reopen() -> History:
        await stack.aclose()
        history = await History.open(tmp_path / "data")
        stack.push_async_callback(history.close)
        return history

    yield reopen
    await stack.aclose()


@pytest.fixture
async def history(opened: Open) -> History:
    return await opened()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"
