"""The answer to a request, for the thread or the event loop that waits for it."""

from __future__ import annotations

import threading
import time
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
        self._events: deque[TokenEvent] = deque()
        self._readers: deque[threading.Lock] = deque()
        """Released at the next token or the end, in place of a condition, which takes five times as long.

        Who waits adds itself and then looks again; who delivers adds tokens and then looks for readers.
        """
        self._waiters: deque[threading.Lock] = deque()
        """Released at the end."""
        self._sleepers: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
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
        self._wait(self._readers, lambda: self._events or self.is_done, timeout)
        return self._take()

    @staticmethod
    def _wait(queue: deque[threading.Lock], is_over: Callable[[], object], timeout: float | None) -> None:
        """Wait in a queue. Raises TimeoutError."""
        until = None if timeout is None else time.monotonic() + timeout
        while not is_over():
            lock = threading.Lock()
            lock.acquire()
            queue.append(lock)
            left = -1.0 if until is None else until - time.monotonic()
            if not is_over() and ((until is not None and left <= 0) or not lock.acquire(timeout=left)):
                with suppress(ValueError):
                    queue.remove(lock)
                if is_over():
                    return
                raise TimeoutError

    async def read_async(self) -> list[TokenEvent]:
        """Wait for tokens in an event loop and return all that have come; none at the end of the answer."""
        import asyncio

        while not (self._events or self.is_done):
            loop = asyncio.get_running_loop()
            sleeper = loop, loop.create_future()
            self._sleepers.append(sleeper)
            try:
                if not (self._events or self.is_done):
                    await sleeper[1]
            finally:
                with suppress(ValueError):
                    self._sleepers.remove(sleeper)
        return self._take()

    def _take(self) -> list[TokenEvent]:
        is_done = self.is_done
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._events.popleft())
        if not taken and is_done and self._error is not None:
            raise self._error
        return taken

    def __next__(self) -> TokenEvent:
        """Wait for the next token."""
        while True:
            is_done = self.is_done  # before the tokens: they come before the end
            try:
                return self._events.popleft()
            except IndexError:
                pass
            if is_done:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            lock = threading.Lock()
            lock.acquire()
            self._readers.append(lock)
            if not (self._events or self.is_done):
                lock.acquire()

    async def __anext__(self) -> TokenEvent:
        """Wait for the next token."""
        events = await self.read_async()
        if not events:
            raise StopAsyncIteration
        self._events.extendleft(reversed(events[1:]))
        return events[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the answer. Raises the engine's error, or TimeoutError after `timeout` seconds."""
        self._wait(self._waiters, lambda: self.is_done, timeout)
        if self._error is not None:
            raise self._error

    # -- for the engine ------------------------------------------------------------------------------------------------

    def measure_by(self, usage: Callable[[], Usage]) -> None:
        """State what counts the cost of the answer."""
        self._measure_usage = usage

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand tokens to the reader."""
        self._events.extend(events)
        if self._readers or self._sleepers:
            self._wake_readers()

    def end(self, events: Sequence[TokenEvent], finish: Finish, stop: str | int | None = None) -> None:
        """Hand the last tokens to the reader, and why the answer ended."""
        self._events.extend(events)
        self._stop = stop
        self._finish = finish
        self._wake_all()

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, unless it has ended."""
        if not self.is_done:
            self._error = error
            self._wake_all()

    def _wake_all(self) -> None:
        self._wake_readers()
        _release(self._waiters)

    def _wake_readers(self) -> None:
        _release(self._readers)
        if self._sleepers:
            waker = self._waker or LoopWaker()
            with suppress(IndexError):
                while True:
                    waker.add(*self._sleepers.popleft())
            if self._waker is None:
                waker.flush()


def _release(queue: deque[threading.Lock]) -> None:
    with suppress(IndexError):
        while True:
            queue.popleft().release()


def _set_done(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
