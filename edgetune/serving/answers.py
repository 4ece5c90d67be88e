"""Answers while they are generated: reasoning, text, tool calls, and why they ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace

from edgetune.data.answer_frame import AnswerReader, Part, TextPiece
from edgetune.errors import EdgetuneError
from edgetune.runtime.batching import Finish
from edgetune.runtime.engine import EngineClosed, QueueFull, Ticket
from edgetune.runtime.generation_request import GenerationRequest, TokenEvent
from edgetune.runtime.grammar import GrammarProblem
from edgetune.runtime.interface import Runtime
from edgetune.runtime.text import Utf8Stream
from edgetune.serving.api_errors import ENGINE_CLOSED, ApiError, from_problem
from edgetune.serving.conversation import (
    Decoding,
    Delta,
    End,
    Text,
    Thought,
    TokenLogprob,
    TokenUsage,
    ToolCall,
    seed_of,
)
from edgetune.serving.json_schemas import check_answer
from edgetune.serving.loaded_files import ModelUse
from edgetune.serving.prompting import PreparedAnswer
from edgetune.serving.tool_calls import MARKERS, ToolCallReader, overlap


def problem_error(problem: Exception, field: str | None = None) -> ApiError:
    """Return the error of a request that the engine refuses or cannot finish."""
    if isinstance(problem, QueueFull):
        return ApiError(429, f"the server is busy: {problem.message}", code="queue_full")
    if isinstance(problem, EngineClosed):
        return ApiError(503, "the model has been closed; try again", code=ENGINE_CLOSED)
    if isinstance(problem, EdgetuneError):
        return from_problem(problem, field)
    return ApiError(500, f"the model failed: {problem}")


def submit(
    model: ModelUse, prepared: PreparedAnswer, decoding: Decoding, stop: tuple[str, ...] = (), field: str = "messages"
) -> list[Ticket]:
    """Queue the choices of a request; all or none.

    Args:
        model: The model.
        prepared: Prompt and grammar.
        decoding: How the answer is decoded; its stop strings are not given to the engine.
        stop: Stop strings for the engine, which look at reasoning, too.
        field: Name of the field with the prompt, for errors.

    Raises:
        ApiError: The engine refuses the request, or its queue is full.
    """
    context = model.runtime.context
    room = context - len(prepared.ids)
    if room <= 0:
        raise ApiError(
            400, f"the prompt has {len(prepared.ids)} tokens, but the context is {context}",
            field, "context_length_exceeded",
        )  # fmt: skip
    limit = room if decoding.max_tokens is None else min(room, decoding.max_tokens)
    tickets: list[Ticket] = []
    try:
        for choice in range(decoding.choices):
            sampling = replace(decoding.sampling, seed=seed_of(decoding.sampling.seed, choice))
            request = GenerationRequest(
                prepared.ids, sampling, limit, stop, logprobs=decoding.logprobs, grammar=prepared.grammar,
                adapters=model.adapters,
            )  # fmt: skip
            tickets.append(model.engine.submit(request))
    except EdgetuneError as problem:
        cancel_all(tickets)
        raise problem_error(problem, prepared.grammar_field if isinstance(problem, GrammarProblem) else None) from None
    return tickets


def cancel_all(tickets: Sequence[Ticket]) -> None:
    """End answers that nobody will read."""
    for ticket in tickets:
        ticket.cancel()


async def read_events(ticket: Ticket) -> AsyncIterator[TokenEvent]:
    """Yield the tokens of a ticket; cancel it if they are not read to the end."""
    try:
        while events := await ticket.read_async():
            for event in events:
                yield event
    except EdgetuneError as problem:
        raise problem_error(problem) from None
    finally:
        if not ticket.is_done:
            ticket.cancel()


def usage_of(ticket: Ticket) -> TokenUsage:
    """Return what an answer has cost."""
    usage = ticket.usage
    return TokenUsage(usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)


def finish_reason(ticket: Ticket) -> str:
    """Return "stop" or "length". Raises ApiError if the answer was cut by the server."""
    if ticket.finish is Finish.CANCEL:
        raise ApiError(503, "the answer was cut off: the server is shutting down")
    return "stop" if ticket.finish is Finish.STOP else "length"


class _StopFilter:
    """Finds stop strings in the text of an answer, and holds back what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._pending = stops, ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that is certain to be shown."""
        if not self._stops:
            return text
        self._pending += text
        places = [(at, -len(stop), stop) for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if places:
            at, _, self.found = min(places)
            shown, self._pending = self._pending[:at], ""
            return shown
        kept = max(overlap(self._pending, stop) for stop in self._stops)
        shown, self._pending = self._pending[: len(self._pending) - kept], self._pending[len(self._pending) - kept :]
        return shown

    def finish(self) -> str:
        """Return what was held back."""
        shown, self._pending = self._pending, ""
        return shown


class AnswerStream:
    """Reads one choice of an answer."""

    def __init__(self, ticket: Ticket, prepared: PreparedAnswer, decoding: Decoding, runtime: Runtime) -> None:
        self._ticket, self._prepared, self._runtime = ticket, prepared, runtime
        self._reader = AnswerReader(prepared.frame)
        self._utf8 = Utf8Stream()
        self._stops = _StopFilter(decoding.stop)
        self._calls = None if prepared.toolbox is None else ToolCallReader(prepared.toolbox, prepared.forced)
        self._tokens: list[TokenLogprob] = []
        self._text: list[str] = []
        self._has_called = False

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the pieces of the answer, and last why it ended.

        Raises:
            ApiError: The answer does not match its schema, or was cut by the server.
        """
        async with aclosing(read_events(self._ticket)) as events:  # type: ignore[type-var]
            async for event in events:
                for delta in self._take(event):
                    yield delta
                if self._is_over:
                    break
        reason = "stop" if self._is_over else finish_reason(self._ticket)
        for delta in self._finish(is_cut=reason != "stop"):
            yield delta
        if self._prepared.validator is not None and reason == "stop":
            check_answer(self._prepared.validator, "".join(self._text))
        if self._tokens:
            yield Text("", tuple(self._tokens))
        if self._has_called:
            reason = "tool_calls"
        yield End(reason, usage_of(self._ticket), self._stops.found)  # type: ignore[arg-type]

    @property
    def _is_over(self) -> bool:
        """Whether the answer ends here, whatever the model goes on to write."""
        return self._stops.found is not None or (self._has_called and self._prepared.has_one_call)

    def _take(self, event: TokenEvent) -> Iterator[Delta]:
        name = b"" if event.bytes_ else self._runtime.token_bytes(event.token, special=True)
        if name:
            text = name.decode("utf-8", "replace")
            is_marker = self._calls is not None and text in MARKERS
            piece = TextPiece(self._utf8.finish() + text, is_special=not is_marker)
        else:
            piece = TextPiece(self._utf8.feed(event.bytes_))
            if event.logprob is not None:
                self._tokens.append(self._with_bytes(event))
        yield from self._parts(self._reader.feed(piece))

    def _with_bytes(self, event: TokenEvent) -> TokenLogprob:
        assert event.logprob is not None
        top = tuple((id_, self._runtime.token_bytes(id_, special=True), logprob) for id_, logprob in event.top)
        return TokenLogprob(event.token, event.bytes_, event.logprob, top)

    def _parts(self, parts: Iterator[Part]) -> Iterator[Delta]:
        for text, is_thought in parts:
            if is_thought:
                self._tokens.clear()  # log-probabilities are those of the answer
                yield Thought(text)
            elif self._stops.found is None:
                yield from self._show(self._stops.feed(text))

    def _show(self, text: str) -> Iterator[Delta]:
        if self._calls is None:
            yield from self._shown(text)
            return
        for each in self._calls.feed(text) if text else ():
            yield from self._shown(each)

    def _shown(self, each: str | ToolCall) -> Iterator[Delta]:
        if self._has_called and self._prepared.has_one_call:
            return
        if isinstance(each, ToolCall):
            self._has_called = True
            yield each
        elif each:
            self._text.append(each)
            tokens, self._tokens = tuple(self._tokens), []
            yield Text(each, tokens)

    def _finish(self, *, is_cut: bool) -> Iterator[Delta]:
        if self._stops.found is None:
            rest = TextPiece(self._utf8.finish())
            yield from self._parts(self._reader.feed(rest))
            yield from self._parts(self._reader.finish(is_cut=is_cut))
            yield from self._show(self._stops.finish())
        if self._calls is not None:
            for each in self._calls.finish():
                yield from self._shown(each)


async def merge(choices: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """Yield (number of the choice, its next piece) of several answers as they come."""
    if len(choices) == 1:
        async with aclosing(choices[0]):  # type: ignore[type-var]
            async for delta in choices[0]:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(choices[index]):  # type: ignore[type-var]
                async for delta in choices[index]:
                    queue.put_nowait((index, delta))
        except Exception as error:  # noqa: BLE001 - it is raised below
            queue.put_nowait((index, error))
        queue.put_nowait((index, None))

    async with AsyncExitStack() as stack:
        for index in range(len(choices)):
            task = asyncio.create_task(pump(index))
            stack.push_async_callback(_cancel, task)
        running = len(choices)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
