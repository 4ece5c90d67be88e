"""One model for many requests: a thread decodes all of them together, and hands each its tokens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.batching import Finish
from edgetune.runtime.generation_request import MAX_LOOKUP, GenerationRequest, Grammar, TokenEvent, Usage
from edgetune.runtime.grammar import GrammarCompiler, GrammarFilter, GrammarProblem
from edgetune.runtime.interface import Runtime
from edgetune.runtime.slots import SPECULATION, ChosenToken, Slots, SlotTask, Speculation
from edgetune.runtime.stop_strings import StopStrings
from edgetune.runtime.ticket import LoopWaker, Ticket
from edgetune.runtime.token_scores import ScoreCollector, ScoredTokens

__all__ = [
    "Engine",
    "EngineClosed",
    "EngineStatus",
    "GenerationRequest",
    "Grammar",
    "QueueFull",
    "ScoredTokens",
    "Ticket",
    "TokenEvent",
    "Usage",
]  # fmt: skip

_SLOTS = 4
_QUEUE = 64
MAX_LOGPROBS = 256


class QueueFull(RuntimeProblem):
    """As many requests wait as may wait; a server answers 503."""


class EngineClosed(RuntimeProblem):
    """The engine has been closed, or was ended by an error."""


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing, and what it has done since it was made.

    Attributes:
        slots: Requests that are decoded together at most.
        active: Requests that are decoded now.
        waiting: Requests that wait for a slot, and texts that wait to be scored.
        requests: Requests that have ended.
        prompt_tokens: Tokens of prompts that were evaluated, without those from the cache.
        cached_tokens: Tokens of prompts that were in the cache.
        generated_tokens: Tokens that were generated.
        drafted_tokens: Tokens that were guessed and verified, right or wrong.
        guessed_tokens: Tokens that were guessed right.
        near_ties: Tokens that were evaluated again without guesses; see `Usage`.
    """

    slots: int
    active: int
    waiting: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int = 0
    guessed_tokens: int = 0
    near_ties: int = 0


class Engine:
    """Decodes the requests of many threads on one runtime. A context manager; thread-safe.

    The runtime belongs to the engine until it is closed: only `tokenize`, `token_bytes` and what does not evaluate the
    model may be called meanwhile. Closing the engine does not close the runtime.
    """

    def __init__(
        self, runtime: Runtime, *, slots: int = _SLOTS, queue: int = _QUEUE, is_exact: bool = False,
        speculation: Speculation = SPECULATION,
    ) -> None:  # fmt: skip
        """Start the decoding thread.

        Args:
            runtime: The model.
            slots: Requests that are decoded together; fewer if memory has no room for them.
            queue: Requests that may wait for a slot.
            is_exact: Whether each request is evaluated alone and from its start, without a cache of earlier ones: its
                result is then that of `Runtime.generate` to the last bit, and does not depend on the others. Slower.
            speculation: How tokens are guessed ahead; not with `is_exact`.

        Raises:
            RuntimeProblem: There is no memory for the slots, or the draft model does not fit.
        """
        if slots < 1 or queue < 1:
            raise RuntimeProblem(f"an engine of {slots} slots with a queue of {queue}", "Give at least 1 of each")
        self._runtime, self._queue = runtime, queue
        self._slots: Slots = runtime.make_slots(slots, is_exact=is_exact, speculation=speculation)
        self._grammars = GrammarCompiler(runtime)
        self._waker = LoopWaker()
        self._changed = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._scores: deque[_ScoreJob] = deque()
        self._work: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._rows: dict[int, _Row] = {}
        """Slot -> its request. Only the decoding thread changes it."""
        self._is_closing = self._must_stop = self._has_cancelled = False
        self._failure: BaseException | None = None
        self._ended = [0] * 6
        self._thread = threading.Thread(target=self._run, name="edgetune-engine", daemon=True)
        self._thread.start()

    @property
    def runtime(self) -> Runtime:
        """The model."""
        return self._runtime

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request, and return the ticket on which its tokens come.

        Raises:
            QueueFull: Too many requests wait.
            EngineClosed: The engine has been closed.
            RuntimeProblem: The request cannot be done: the prompt is empty, too long or has ids outside the vocabulary,
                a value of its sampling is out of range, or its grammar cannot be compiled.
        """
        row = self._check(request)
        with self._changed:
            self._require_room()
            self._runtime.find_adapters(request.adapters)  # which may have been unloaded meanwhile
            self._waiting.append(row)
            self._changed.notify_all()
        return row.ticket

    def _check(self, request: GenerationRequest) -> _Row:
        runtime, size = self._runtime, self._runtime.vocabulary_size
        if request.max_tokens < 0:
            raise RuntimeProblem(f"max_tokens is {request.max_tokens}", "Give a number of at least 0")
        if request.logprobs is not None and not 0 <= request.logprobs <= min(size, MAX_LOGPROBS):
            raise RuntimeProblem(
                f"logprobs is {request.logprobs}", f"Give a number from 0 to {min(size, MAX_LOGPROBS)}"
            )
        outside = next((token for token in sorted(request.stop_tokens) if not 0 <= token < size), None)
        if outside is not None:
            raise RuntimeProblem(f"stop token {outside} is outside the vocabulary of {size}", "Give ids of tokens")
        request.sampling.check(size)
        ids = runtime.check_prompt(request.ids, request.max_tokens)
        filter_ = self._grammars.compile(request.grammar) if request.grammar else None
        stops = request.stop_tokens | (frozenset() if request.ignore_eos else runtime.stop_tokens)
        ticket = Ticket(request, self._note_cancelled, self._waker)
        if not 0 <= request.lookup <= MAX_LOOKUP:
            raise RuntimeProblem(f"lookup is {request.lookup}", f"Give a number from 0 to {MAX_LOOKUP}")
        task = SlotTask(
            ids, request.sampling, request.logprobs, filter_.mask() if filter_ else None,
            runtime.find_adapters(request.adapters), request.lookup, request.speculate,
        )  # fmt: skip
        return _Row(ticket, task, filter_, stops, StopStrings(request.stop), runtime.context)

    def submit_score(
        self,
        ids: Sequence[int],
        positions: Sequence[int] | None = None,
        *,
        top: int = 0,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> Future[ScoredTokens]:
        """Queue a text to be scored; the result is that of `score`. Cancel the future to drop it."""
        text = np.asarray(ids, np.int32)
        wanted = np.arange(1, len(text)) if positions is None else np.asarray(positions, np.int64)
        if len(wanted) and (wanted[0] < 1 or wanted[-1] >= len(text) or (np.diff(wanted) <= 0).any()):
            raise RuntimeProblem(f"positions of a text of {len(text)} tokens", "Give increasing ones from 1 on")
        if not 0 <= top <= min(MAX_LOGPROBS, self._runtime.vocabulary_size):
            raise RuntimeProblem(f"top is {top}", f"Give a number from 0 to {MAX_LOGPROBS}")
        self._runtime.check_ids(text)
        job = _ScoreJob(text, wanted, top, adapters)
        with self._changed:
            self._require_room()
            self._runtime.find_adapters(adapters)
            self._scores.append(job)
            self._changed.notify_all()
        return job.future

    def score(
        self,
        ids: Sequence[int],
        positions: Sequence[int] | None = None,
        *,
        top: int = 0,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> ScoredTokens:
        """Return the log-probabilities of tokens in a text.

        The text is evaluated alone, in batches of a fixed shape and without a cache of earlier texts: the result does
        not depend on other requests.

        Args:
            ids: Token ids [n].
            positions: Increasing positions p, 1 <= p < n, of the tokens to score; None takes all.
            top: How many of the most likely tokens are returned for each position.
            adapters: As in `GenerationRequest`.

        Raises:
            QueueFull: Too many requests wait.
            EngineClosed: The engine has been closed.
            RuntimeProblem: The text is too long or has ids outside the vocabulary.
        """
        return self.submit_score(ids, positions, top=top, adapters=adapters).result()

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_adapter(self, path: Path, name: str | None = None) -> str:
        """Load a GGUF LoRA adapter between two turns; return its name, for `GenerationRequest.adapters`.

        Args:
            path: The adapter.
            name: Its name; None takes that of the file.

        Raises:
            EngineClosed: The engine has been closed.
            RuntimeProblem: It is not an adapter of this model, or the name is taken.
        """
        chosen = path.stem if name is None else name
        self._between_turns(lambda: self._runtime.load_adapter(path, chosen))
        return chosen

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. Raises RuntimeProblem for an unknown name, and while requests use it."""
        self._between_turns(lambda: self._unload(name))

    def _unload(self, name: str) -> None:
        with self._changed:  # no request that uses it is submitted meanwhile
            ((adapter, _),) = self._runtime.find_adapters(((name, 1.0),))
            used = [pair for row in (*self._rows.values(), *self._waiting) for pair in row.task.adapters]
            used += [pair for job in self._scores for pair in self._runtime.find_adapters(job.adapters)]
            if any(each is adapter for each, _ in used):
                raise RuntimeProblem(f"requests use adapter {name!r}", "Wait for them, or cancel them")
            self._slots.forget_adapter(adapter)
            self._runtime.unload_adapter(name)

    def _between_turns(self, work: Callable[[], None]) -> None:
        """Do something in the decoding thread."""
        done: Future[None] = Future()
        with self._changed:
            self._require_open()
            self._work.append((work, done))
            self._changed.notify_all()
        done.result()

    def _require_open(self) -> None:
        if self._failure is not None:
            raise EngineClosed(f"the engine was ended by an error: {self._failure}", "Start it again")
        if self._is_closing:
            raise EngineClosed("the engine has been closed")

    def _require_room(self) -> None:
        self._require_open()
        if len(self._waiting) + len(self._scores) >= self._queue:
            raise QueueFull(f"{self._queue} requests are waiting", "Try again later")

    def _note_cancelled(self) -> None:
        with self._changed:
            self._has_cancelled = True
            self._slots.interrupt()
            self._changed.notify_all()

    @property
    def status(self) -> EngineStatus:
        """What the engine is doing."""
        with self._changed:
            waiting = len(self._waiting) + len(self._scores)
            requests, new, cached, generated, guessed, ties = self._ended
            return EngineStatus(
                self._slots.capacity, len(self._rows), waiting, requests, new, cached, generated, self._slots.drafted,
                guessed, ties,
            )  # fmt: skip

    def close(self, deadline: float = 0.0) -> None:
        """Take no more requests, finish those that there are within `deadline` seconds, and cancel the rest.

        Idempotent.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(deadline)
        with self._changed:
            self._must_stop = True
            self._slots.interrupt()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the decoding thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                if self._waiting:
                    self._admit()
                    self._waker.flush()
                if self._scores:
                    self._score_block()
                if self._rows:
                    for chosen in self._slots.turn():
                        if row := self._rows.get(chosen.slot):  # several tokens may come at once, the last one early
                            self._advance(row, chosen)
                self._waker.flush()
        except BaseException as error:  # noqa: BLE001 - it is raised where the tokens are awaited
            self._failure = error
        self._end_all()
        self._waker.flush()
        self._slots.close()

    def _wait(self) -> bool:
        """Wait for something to do; return whether there is any."""
        if self._rows and not (self._has_cancelled or self._waiting or self._scores or self._work or self._must_stop):
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._rows or self._waiting or self._scores or self._work or self._is_closing
            )
            work = list(self._work)
            self._work.clear()
            has_cancelled, self._has_cancelled = self._has_cancelled, False
            if has_cancelled:
                self._slots.resume()
        for each, done in work:
            _complete(done, each)
        with self._changed:
            is_idle = not (self._rows or self._waiting or self._scores)
            if self._must_stop or (is_idle and self._is_closing):
                return False
        if has_cancelled:
            self._drop_cancelled()
        return True

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [row for row in self._waiting if row.ticket.is_cancelled]
            self._waiting = deque(row for row in self._waiting if not row.ticket.is_cancelled)
        for row in (*dropped, *(row for row in list(self._rows.values()) if row.ticket.is_cancelled)):
            self._end(row, [], Finish.CANCEL)

    def _admit(self) -> None:
        """Give free slots to waiting requests in the order of their submission."""
        while len(self._rows) < self._slots.capacity:
            if self._scores and self._scores[0].has_begun and self._slots.admits_in_runtime_cache:
                return
            with self._changed:
                if not self._waiting:
                    return
                row = self._waiting.popleft()
            row.begin()
            if not row.remaining:
                self._end(row, [], Finish.LENGTH)
                continue
            try:
                row.slot, cached = self._slots.start(row.task)
            except RuntimeProblem as error:
                row.ticket.fail(error)
                continue
            except BaseException as error:
                row.ticket.fail(error)
                raise
            row.cached = cached
            self._rows[row.slot] = row

    def _score_block(self) -> None:
        """Score one block of the first waiting text, so that answers go on meanwhile."""
        while self._scores and self._scores[0].future.cancelled():
            self._scores.popleft()
        if not self._scores or (self._slots.steps_in_runtime_cache and self._rows):
            return
        if self._slots.admits_in_runtime_cache and self._slots.has_prompts:
            return
        job = self._scores[0]
        try:
            is_done = job.advance(self._runtime)
        except Exception as error:  # noqa: BLE001 - it is raised where the scores are awaited
            with suppress(InvalidStateError):
                job.future.set_exception(error)
            is_done = True
        if is_done:
            with self._changed:
                self._scores.popleft()

    def _advance(self, row: _Row, chosen: ChosenToken) -> None:
        """Hand on a token of a request, or end it."""
        try:
            finish, stop, events = row.take(chosen)
            if row.filter and finish is None:
                self._slots.set_mask(row.slot, row.filter.mask())
        except GrammarProblem as error:
            self._free(row)
            row.ticket.fail(error)
            return
        if finish is not None:
            self._end(row, events, finish, stop)
        elif events:
            row.ticket.deliver(events)

    def _free(self, row: _Row) -> None:
        if row.slot >= 0:
            with self._changed:
                del self._rows[row.slot]
            self._slots.stop(row.slot)

    def _end(self, row: _Row, events: Sequence[TokenEvent], finish: Finish, stop: str | int | None = None) -> None:
        self._free(row)
        usage = row.usage()
        new = usage.prompt_tokens - usage.cached_tokens if row.slot >= 0 else 0
        counts = 1, new, usage.cached_tokens, usage.generated_tokens, usage.guessed_tokens, usage.near_ties
        for index, count in enumerate(counts):
            self._ended[index] += count
        row.ticket.end(events, finish, stop)

    def _end_all(self) -> None:
        with self._changed:
            self._is_closing = True
            rows, scores = [*self._rows.values(), *self._waiting], list(self._scores)
            work = list(self._work)
            self._rows.clear()
            self._waiting.clear()
            self._scores.clear()
            self._work.clear()
        for row in rows:
            if self._failure is not None:
                row.ticket.fail(self._failure)
            else:
                row.ticket.end([], Finish.CANCEL)
        futures: list[Future[Any]] = [*(job.future for job in scores), *(done for _, done in work)]
        for future in futures:
            with suppress(InvalidStateError):
                future.set_exception(self._failure or EngineClosed("the engine has been closed"))


def _complete(future: Future[None], work: Callable[[], None]) -> None:
    """Do something and give a future its result."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
        future.set_exception(error)
    else:
        future.set_result(None)


class _Row:
    """A request in the engine."""

    def __init__(
        self,
        ticket: Ticket,
        task: SlotTask,
        filter_: GrammarFilter | None,
        stop_tokens: frozenset[int],
        stops: StopStrings,
        context: int,
    ) -> None:
        self.ticket, self.task, self.filter, self.stop_tokens = ticket, task, filter_, stop_tokens
        self.remaining = ticket.request.max_tokens
        self.slot = -1
        self.cached = self.generated = self.guessed = self.near_ties = 0
        self._stops, self._room = stops, context - len(task.ids)
        self._submitted = self._began = self._first = self._last = time.perf_counter()
        ticket.measure_by(self.usage)

    def begin(self) -> None:
        self._began = self._first = self._last = time.perf_counter()

    def take(self, chosen: ChosenToken) -> tuple[Finish | None, str | int | None, list[TokenEvent]]:
        """Count a token; return whether and by which stop the answer ends, and the tokens that are shown now."""
        self._last = time.perf_counter()
        if not self.generated:
            self._first = self._last
        self.generated += 1
        self.guessed += chosen.was_guessed
        self.near_ties += chosen.is_near_tie
        if self.filter:
            self.filter.accept(chosen.token)
        if chosen.token in self.stop_tokens:
            return Finish.STOP, chosen.token, self._stops.finish()
        self.remaining -= 1
        shown, stop = self._stops.feed(TokenEvent(*chosen[1:5]))
        if stop is not None:
            return Finish.STOP, stop, shown
        finish = None
        if self.filter and self.filter.is_complete:
            finish = Finish.STOP
        elif self.generated > self._room:
            finish = Finish.CONTEXT
        elif not self.remaining:
            finish = Finish.LENGTH
        return finish, None, shown + self._stops.finish() if finish else shown

    def usage(self) -> Usage:
        return Usage(
            len(self.task.ids), self.cached, self.generated, self._began - self._submitted, self._first - self._began,
            self._last - self._first, self.guessed, self.near_ties,
        )  # fmt: skip


class _ScoreJob:
    """A text that is scored block by block."""

    def __init__(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int64],
        top: int,
        adapters: Sequence[tuple[str, float]],
    ) -> None:
        self.adapters = tuple(adapters)
        self.future: Future[ScoredTokens] = Future()
        self._ids, self._positions = ids, positions
        self._collector = ScoreCollector(ids[positions], top)
        self._blocks: Iterator[NDArray[np.float32]] | None = None

    @property
    def has_begun(self) -> bool:
        return self._blocks is not None

    def advance(self, runtime: Runtime) -> bool:
        """Score one block; return whether that was the last, with which the future has its result."""
        if self._blocks is None:
            runtime.use_adapters(self.adapters)
            self._blocks = runtime.score(self._ids, self._positions)
        block = next(self._blocks, None)
        if block is not None:
            self._collector.add(block)
            return False
        with suppress(InvalidStateError):
            self.future.set_result(self._collector.result())
        return True
