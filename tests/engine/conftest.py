"""Fixtures of the engine's tests: engines with options, made once a module."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mochi_app.engine.pipeline import Engine
from mochi_app.engine.speed import SpeedOptions
from tests.speed_engines import (
    OPTIONS,
    Optioned,
    build,
    frames_of,
    quick_compilation,
)


@pytest.fixture(scope="module")
def own_thread_and_graphs() -> Iterator[None]:
    """Leave the process to other tests as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain_engine() -> Engine:
    """An engine without options."""
    return build(SpeedOptions())


@pytest.fixture(scope="module")
def plain_frames(plain_engine: Engine) -> np.ndarray[Any, Any]:
    """Its frames."""
    return frames_of(plain_engine)


@pytest.fixture(scope="module")
def engine_with() -> Optioned:
    """`engine_with(name)`: an engine, made once, and the frames of the request as its first run."""

    @cache
    def make(name: str) -> tuple[Engine, np.ndarray[Any, Any]]:
        with quick_compilation():
            engine = build(OPTIONS[name])
        return engine, frames_of(engine)

    return make
