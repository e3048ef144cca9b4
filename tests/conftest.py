"""Fixtures for every layer. Each test has a data folder of its own; the processes are real."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mochi_app.accounts import Account
from mochi_app.model_defaults import ModelDefaults, load_model_defaults
from mochi_app.setting_types import parse_slots
from mochi_app.settings import Settings, load_settings
from mochi_app.slots.pool import Pool
from mochi_app.slots.slot import Slot
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.studio import Studio
from tests.clocks import Clock
from tests.people import cheap
from tests.serving import Served


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def auth_file(tmp_path: Path) -> Path:
    """Ann, and Ada the admin. Their passwords are `NAME's password`."""
    path = tmp_path / "accounts"
    people = [Account("ann", cheap("ann's password"))]
    people.append(Account("ada", cheap("ada's password"), admin=True))
    path.write_text("# the team\n\n" + "".join(f"{person}\n" for person in people))
    return path


DEADLINE = 30.0  # seconds; a test that waits longer has failed


def fake_engine(behaviour: str = "ok") -> tuple[str, ...]:
    """Command of a real rank process with a faked model; see tests/engines/fake.py."""
    return (sys.executable, "-m", "tests.engines.fake", behaviour)


async def eventually(
    condition: Callable[[], Any], what: str = "condition", deadline: float = DEADLINE
) -> Any:
    """Poll until `condition()` is true, and return its value."""
    limit = time.monotonic() + deadline
    while time.monotonic() < limit:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} did not come true within {deadline} s")


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test, and no data folder is shared."""
    for name in list(os.environ):
        if name.startswith(("MOCHI_", "GRADIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MOCHI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")


def quick_settings(**overrides: Any) -> Settings:
    """Settings with short deadlines, for faked models."""
    quick: dict[str, Any] = {
        "heartbeat_timeout": 10,
        "step_timeout": 10,
        "cancel_timeout": 10,
        "start_timeout": 20,
        "load_timeout": 20,
        "restart_backoff": 0.05,
        "restart_backoff_max": 0.4,
        "drain_seconds": 1,
    }
    if isinstance(overrides.get("slots"), str):
        overrides["slots"] = parse_slots(overrides["slots"])
    return load_settings(**(quick | overrides))


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server over the embedded model, for all tests that leave it as they found it."""
    served = Served(tmp_path_factory.mktemp("app") / "data").start().ready()
    yield served
    served.end()


@pytest.fixture
async def make_slot(tmp_path: Path) -> AsyncIterator[Callable[..., Slot]]:
    """`make_slot(behaviour, **settings)`: a slot with a faked model, ended after the test."""
    slots: list[Slot] = []

    def make(behaviour: str = "ok", command: Sequence[str] = (), **overrides: Any) -> Slot:
        settings = quick_settings(**overrides)
        scratch = tmp_path / f"scratch{len(slots)}"
        scratch.mkdir()
        slots.append(
            Slot(
                len(slots),
                settings.slots[0],
                settings,
                scratch,
                command=command or fake_engine(behaviour),
            )
        )
        return slots[-1]

    yield make
    for slot in slots:
        await slot.stop(grace=0)


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Pool]]]:
    """`await make_pool(behaviour, **settings)`: a started pool over faked models."""
    pools: list[Pool] = []

    def scratch(slot: int) -> Path:
        folder = tmp_path / f"slot{slot}"
        folder.mkdir()
        return folder

    async def make(behaviour: str = "ok", **overrides: Any) -> Pool:
        pool = Pool(quick_settings(**overrides), scratch, command=fake_engine(behaviour))
        pools.append(pool)
        pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.stop(0.1)


@pytest.fixture
async def make_studio(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Studio]]]:
    """`await make_studio(behaviour, **settings)`: a started studio over a faked model.

    Without the web there are no tickets, so the test takes turns itself: see `take_turns`.
    """
    opened: list[tuple[Studio, asyncio.Task[None]]] = []

    async def make(behaviour: str = "ok", *, turns: bool = True, **overrides: Any) -> Studio:
        settings = quick_settings(**overrides)
        history = await History.open(settings.data_dir)
        media = MediaStore(settings.data_dir)
        pool = Pool(settings, media.scratch, command=fake_engine(behaviour))
        studio = Studio(settings, tiny_defaults(settings), history, media, pool)
        await studio.start()
        opened.append((studio, asyncio.create_task(take_turns(studio, turns))))
        return studio

    yield make
    for studio, turns in opened:
        await close_studio(studio)
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)


def tiny_defaults(settings: Settings) -> ModelDefaults:
    """The embedded model's defaults at its smallest size, so that encoding costs nothing."""
    return load_model_defaults(settings).model_copy(
        update={"height": 64, "width": 64, "num_frames": 7, "fps": 12}
    )


async def close_studio(studio: Studio) -> None:
    """Stop a studio and free its data folder; safe to repeat."""
    await studio.stop()
    await studio.history.close()


async def take_turns(studio: Studio, enabled: bool = True) -> None:
    """What tickets do, without Gradio: one turn at a time per slot, as long as there is work."""

    async def one_after_another() -> None:
        while not studio.stopping:
            count = studio.changed.count
            if await studio.dispatch.engine_turn() is None:
                await studio.changed.after(count)

    if enabled:
        await asyncio.gather(*(one_after_another() for _ in studio.pool.slots))
