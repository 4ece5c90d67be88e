"""Reading, computing and writing at the same time: one item ahead, one item behind, each on a thread of its own.

Almost all of the work releases the interpreter lock (mapped reads, matrix products, quantization, hashing, writing), so
the stages really overlap. No more than three items are alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made while the caller works on the one before. An error arrives where the item would have."""
    end = object()
    with ThreadPoolExecutor(1, "edgetune-read") as pool:
        coming: Future[T | object] = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # not the sentinel


class Behind:
    """Runs calls one after the other while the caller goes on; an error is raised by the next call, or at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "edgetune-write")
        self._running: Future[None] | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        """Wait for the call before, then start this one."""
        self._wait()
        self._running = self._pool.submit(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()
