"""Work that outlasts the cancel of whoever waits for it."""

from __future__ import annotations

import asyncio

import pytest

from mochi_app.cancels import to_the_end, unbroken


async def test_a_cancel_comes_when_the_work_is_done_however_often_it_is_asked_for() -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go.wait()
        done.set()

    task = asyncio.create_task(unbroken(work()))
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_without_a_cancel_the_work_answers_for_itself() -> None:
    async def answer() -> int:
        return 7

    async def fail() -> int:
        raise ValueError("no")

    assert await unbroken(answer()) == 7
    with pytest.raises(ValueError, match="no"):
        await unbroken(fail())


async def test_what_was_begun_is_done_though_its_caller_leaves() -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @to_the_end
    async def work() -> None:
        begun.set()
        await go.wait()
        done.set()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await asyncio.wait_for(done.wait(), 10)
