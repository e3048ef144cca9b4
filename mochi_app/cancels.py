"""Work that a cancel of whoever waits for it does not break off."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


async def unbroken(work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work` to its end even when cancelled meanwhile, however often; then raise the cancel.

    For what has an owner only when it is done, such as a half spawned child.
    """
    task = asyncio.create_task(work)
    cancel: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancel = error
    if cancel is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # the cancel is what its caller hears of
    raise cancel


def to_the_end(
    method: Callable[Params, Coroutine[Any, Any, Result]],
) -> Callable[Params, Coroutine[Any, Any, Result]]:
    """What was begun is done whole, its caller there or not: Gradio cancels a call, wherever it
    stands, when its caller asks for that."""

    @functools.wraps(method)
    async def whole(*arguments: Params.args, **options: Params.kwargs) -> Result:
        return await asyncio.shield(method(*arguments, **options))

    return whole
