"""Calls of a model in a thread, which the cancellation of a request does not leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_thread(
    function: Callable[..., T], *args: Any, discard: Callable[[T], None] | None = None, **keywords: Any
) -> T:
    """Run a function in a thread and return its result.

    A cancelled task waits until the thread has ended: before that, the model that the function uses must not be freed.

    Args:
        function: What is called.
        *args: Its positional arguments.
        discard: Takes a result that a cancelled task cannot return.
        **keywords: Its further arguments.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(function, *args, **keywords))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        while not thread.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([thread])
        if thread.exception() is None and discard is not None:
            discard(thread.result())
        raise
