"""Calls of a model in a thread, and the cancellation of the task that waits for them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edgetune.serving.worker_threads import run_in_thread


def test_a_result_or_an_error_comes_from_the_thread() -> None:
    def fail() -> None:
        raise ValueError("no")

    assert asyncio.run(run_in_thread(max, 3, 7)) == 7
    with pytest.raises(ValueError, match="no"):
        asyncio.run(run_in_thread(fail))


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_task_ends_after_its_thread(fails: bool) -> None:
    begun, released = threading.Event(), threading.Event()
    discarded: list[str] = []

    def work() -> str:
        begun.set()
        released.wait(10)
        if fails:
            raise ValueError("too late")
        return "result"

    async def main() -> None:
        task = asyncio.create_task(run_in_thread(work, discard=discarded.append))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        released.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert discarded == ([] if fails else ["result"])
