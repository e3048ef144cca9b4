"""Fixtures of the web's tests: the whole app in process, over a faked model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mochi_app import app
from mochi_app.slots.pool import Pool
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.studio import Studio
from tests.asgi import Web, asking
from tests.conftest import fake_engine, quick_settings, tiny_defaults


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Web]:
    """`await web(**settings)`: the app with a faked model; its `client`, `studio` and `app`."""
    ending: list[Callable[[], Awaitable[Any]]] = []

    async def start(**overrides: Any) -> SimpleNamespace:
        settings = quick_settings(**overrides)
        history = await History.open(settings.data_dir)
        media = MediaStore(settings.data_dir)
        pool = Pool(settings, media.scratch, command=fake_engine())
        studio = Studio(settings, tiny_defaults(settings), history, media, pool)
        built = app.build_web(studio, "the ticket secret")
        lifespan = built.router.lifespan_context(built)
        await lifespan.__aenter__()
        ending.append(lambda: lifespan.__aexit__(None, None, None))
        client = asking(built, "http://127.0.0.1")
        ending.append(client.aclose)
        return SimpleNamespace(app=built, client=client, studio=studio)

    yield start
    for end in reversed(ending):
        await end()
