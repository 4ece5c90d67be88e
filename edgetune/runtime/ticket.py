"""The answer to a request, for the thread or the event loop that waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from edgetune.runtime.batching import Finish
from edgetune.runtime.generation_request import GenerationRequest, TokenEvent, Usage

if TYPE_CHECKING:  # imported where an event loop waits: it takes 30 ms
    import asyncio


class LoopWaker:
    """Wakes the readers in event loops, those of a turn with one call: each call writes to the pipe of the loop."""

    def __init__(self) -> None:
        self._futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        """Note a reader that `flush` wakes."""
        self._futures.setdefault(loop, []).append(future)

    def flush(self) -> None:
        """Wake the readers that were noted."""
        if self._futures:
            for loop, futures in self._futures.items():
                with suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(_set_done, futures)
            self._futures = {}


class Ticket(Iterator[TokenEvent], AsyncIterator[TokenEvent]):
    """The tokens of an answer, each as soon as it is certain that it is shown. Thread-safe.

    Iterate with `for` in a thread or with `async for` in an event loop. An error of the engine is raised there, after
    the tokens that came before it. An answer that nobody reads is generated all the same: call `cancel`.

    Attributes:
        request: What was asked.
    """

    def __init__(
        self, request: GenerationRequest, wake_engine: Callable[[], None], waker: LoopWaker | None = None
    ) -> None:
        """Create the ticket of a request.

        Args:
            request: What was asked.
            wake_engine: Tells the engine that the request is cancelled.
            waker: Is told of readers in event loops, and flushed by the engine; None: they are woken at once.
        """
        self.request = request
        self._wake_engine, self._waker = wake_engine, waker
        self._changed = threading.Condition()
        self._events: deque[TokenEvent] = deque()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._measure_usage: Callable[[], Usage] = lambda: Usage(len(request.ids))
        self._finish: Finish | None = None
        self._stop: str | int | None = None
        self._error: BaseException | None = None
        self._is_cancelled = False

    @property
    def finish(self) -> Finish | None:
        """Why the answer ended; None while it is being generated and after an error."""
        return self._finish

    @property
    def stop(self) -> str | int | None:
        """The stop string or the id of the stop token that ended the answer; None if neither did."""
        return self._stop

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self._measure_usage()

    @property
    def is_done(self) -> bool:
        """Whether no more tokens will come, apart from those that have not been read."""
        return self._finish is not None or self._error is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    def cancel(self) -> None:
        """End the answer within one token and free its place. Does nothing after its end."""
        self._is_cancelled = True
        self._wake_engine()

    def read(self, timeout: float | None = None) -> list[TokenEvent]:
        """Wait for tokens and return all that have come; none at the end of the answer.

        Raises:
            TimeoutError: None came in `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._events or self.is_done, timeout):
                raise TimeoutError
            return self._take()

    async def read_async(self) -> list[TokenEvent]:
        """Wait for tokens in an event loop and return all that have come; none at the end of the answer."""
        import asyncio

        while True:
            with self._changed:
                if self._events or self.is_done:
                    return self._take()
                loop = asyncio.get_running_loop()
                sleeper = loop, loop.create_future()
                self._sleepers.append(sleeper)
            try:
                await sleeper[1]
            finally:
                with self._changed, suppress(ValueError):
                    self._sleepers.remove(sleeper)

    def _take(self) -> list[TokenEvent]:
        taken = list(self._events)
        self._events.clear()
        if not taken and self._error is not None:
            raise self._error
        return taken

    def __next__(self) -> TokenEvent:
        """Wait for the next token."""
        with suppress(IndexError):
            return self._events.popleft()
        with self._changed:
            self._changed.wait_for(lambda: self._events or self.is_done)
            if self._events:
                return self._events.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    async def __anext__(self) -> TokenEvent:
        """Wait for the next token."""
        events = await self.read_async()
        if not events:
            raise StopAsyncIteration
        with self._changed:
            self._events.extendleft(reversed(events[1:]))
        return events[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the answer. Raises the engine's error, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError
            if self._error is not None:
                raise self._error

    # -- for the engine ------------------------------------------------------------------------------------------------

    def measure_by(self, usage: Callable[[], Usage]) -> None:
        """State what counts the cost of the answer."""
        self._measure_usage = usage

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand tokens to the reader."""
        with self._changed:
            self._events.extend(events)
            self._wake_readers()

    def end(self, events: Sequence[TokenEvent], finish: Finish, stop: str | int | None = None) -> None:
        """Hand the last tokens to the reader, and why the answer ended."""
        with self._changed:
            self._events.extend(events)
            self._stop, self._finish = stop, finish
            self._wake_readers()

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, unless it has ended."""
        with self._changed:
            if not self.is_done:
                self._error = error
                self._wake_readers()

    def _wake_readers(self) -> None:
        self._changed.notify_all()
        if self._sleepers:
            waker = self._waker or LoopWaker()
            for loop, future in self._sleepers:
                waker.add(loop, future)
            self._sleepers.clear()
            if self._waker is None:
                waker.flush()


def _set_done(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
