"""Shield work from the cancellation of its waiter."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


async def unbroken(work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work` to its end even if cancelled meanwhile, however often; then raise the cancel.

    For work whose result has no owner until it is done, such as spawning a child.
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
        task.exception()  # retrieved: the caller gets the cancel instead
    raise cancel


def to_the_end(
    method: Callable[Params, Coroutine[Any, Any, Result]],
) -> Callable[Params, Coroutine[Any, Any, Result]]:
    """Decorator: finish a method even if its caller is gone, since Gradio may cancel a call at any
    point at its client's request."""

    @functools.wraps(method)
    async def whole(*arguments: Params.args, **options: Params.kwargs) -> Result:
        return await asyncio.shield(method(*arguments, **options))

    return whole
