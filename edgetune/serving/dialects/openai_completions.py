"""OpenAI's completions: texts and token ids, batches, and echo with the log-probabilities of the prompt.

With echo and logprobs the whole text, prompt and answer, is scored in one pass of a fixed shape. The first token has no
log-probability, since nothing predicts it; that of each other token is at its own place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from edgetune.errors import EdgetuneError
from edgetune.runtime.batching import Finish
from edgetune.runtime.engine import Ticket
from edgetune.runtime.interface import Runtime
from edgetune.runtime.text import Utf8Stream
from edgetune.runtime.token_scores import ScoredTokens
from edgetune.serving.answers import cancel_all, finish_reason, problem_error, read_events, submit, usage_of
from edgetune.serving.api_errors import ApiError, bad_request, from_problem, openai_error
from edgetune.serving.calls import Call, RouteSpec, new_id
from edgetune.serving.conversation import Decoding, TokenLogprob, TokenUsage
from edgetune.serving.dialects.openai_chat import OpenAiFields, stream_error, usage_object
from edgetune.serving.loaded_files import ModelUse
from edgetune.serving.prompting import PreparedAnswer
from edgetune.serving.replies import DONE, SSE, Event, Stream
from edgetune.serving.worker_threads import run_in_thread

_MAX_TOKENS = 16  # OpenAI's default
_MOST_PROMPTS = 1024
_MOST_LOGPROBS = 100
_RETRY_SECONDS = 0.05

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(OpenAiFields):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


async def completions(call: Call[CompletionRequest]) -> Any:
    """Continue texts."""
    fields = call.fields
    if fields.suffix:
        raise bad_request("suffix is not supported: the model continues a text, it does not fill a gap", "suffix")
    if fields.best_of is not None and fields.best_of > (fields.n or 1):
        raise bad_request("best_of above n is not supported; send n, and choose by logprobs", "best_of")
    model = fields.choose_adapters(await call.model(fields.model))
    prompts = await run_in_thread(_prompts, fields.prompt, model.runtime)
    batch = _Batch(call, model, fields)
    frame = {
        "id": new_id("cmpl-"), "object": "text_completion", "created": call.created, "model": model.name,
        "system_fingerprint": call.fingerprint(model),
    }  # fmt: skip
    if fields.stream:
        return Stream(batch.events(prompts, frame, with_usage=fields.wants_usage), SSE, stream_error)
    results = await batch.run(prompts)
    choices = [result.choice(index) for index, result in enumerate(results)]
    return {**frame, "choices": choices, "usage": usage_object(batch.usage)}


@dataclass(frozen=True)
class _Prompt:
    """A prompt: its ids, and the text that `echo` repeats."""

    ids: list[int]
    text: str
    bos_length: int = 0
    """Tokens at the beginning that are not in the text."""


def _prompts(given: Any, runtime: Runtime) -> list[_Prompt]:
    """Return the prompts of a request. Raises ApiError, with the field."""
    if isinstance(given, str):
        return [_from_text(given, runtime, "prompt")]
    if isinstance(given[0], int):
        return [_from_ids(given, runtime, "prompt")]
    if len(given) > _MOST_PROMPTS:
        raise bad_request(f"prompt has {len(given)} prompts, and at most {_MOST_PROMPTS} are answered", "prompt")
    make = _from_text if isinstance(given[0], str) else _from_ids
    return [make(each, runtime, f"prompt.{index}") for index, each in enumerate(given)]


def _from_text(text: str, runtime: Runtime, name: str) -> _Prompt:
    try:
        ids = runtime.tokenize(text)
    except EdgetuneError as problem:
        raise from_problem(problem, name) from None
    if not ids:
        if runtime.bos_token is None:
            raise bad_request(f"{name} is empty", name)
        ids = [runtime.bos_token]
    has_bos = ids[0] == runtime.bos_token and not text.startswith(_name(ids[0], runtime))
    return _Prompt(ids, text, int(has_bos))


def _from_ids(ids: Sequence[int], runtime: Runtime, name: str) -> _Prompt:
    outside = next((id_ for id_ in ids if id_ >= runtime.vocabulary_size), None)
    if outside is not None:
        raise bad_request(f"{name}: token {outside} is outside the vocabulary of {runtime.vocabulary_size}", name)
    raw = b"".join(runtime.token_bytes(id_, special=True) for id_ in ids)
    return _Prompt(list(ids), raw.decode("utf-8", "replace"))


def _name(token: int, runtime: Runtime) -> str:
    return runtime.token_bytes(token, special=True).decode("utf-8", "replace")


@dataclass
class _Result:
    """One choice: its text and why it ended."""

    text: str
    finish: str
    usage: TokenUsage
    logprobs: dict[str, Any] | None = None

    def choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": self.text, "logprobs": self.logprobs, "finish_reason": self.finish}


@dataclass
class _Batch:
    """The prompts of a request."""

    call: Call[CompletionRequest]
    model: ModelUse
    fields: CompletionRequest
    usage: TokenUsage = field(default_factory=TokenUsage)

    def __post_init__(self) -> None:
        fields, settings = self.fields, self.call.server.settings
        sampling = fields.sampling(settings.sampling, self.model.runtime.vocabulary_size)
        limit = _MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        self.decoding = Decoding(sampling, limit, fields.stops, fields.logprobs, fields.n or 1)
        self.scores_prompt = bool(fields.echo) and fields.logprobs is not None
        self.has_begun = False

    async def run(self, prompts: Sequence[_Prompt]) -> list[_Result]:
        """Return all choices, in the order of the prompts; as many at a time as the engine decodes together."""
        room = asyncio.Semaphore(max(1, self.model.engine.status.slots))

        async def one(prompt: _Prompt) -> list[_Result]:
            async with room:
                return await self.answer(prompt)

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            return [result for each in tasks for result in await each]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, prompt: _Prompt) -> list[_Result]:
        """Return the choices of one prompt."""
        if self.decoding.max_tokens == 0:
            results = [await self._score_only(prompt)]
        elif self.scores_prompt and self._is_one_greedy_token():
            results = [await self._score_and_continue(prompt)]
        else:
            tickets = await self._submit(prompt)
            results = [await self._read(prompt, ticket) for ticket in tickets]
        spent = TokenUsage(len(prompt.ids), results[0].usage.cached, sum(each.usage.generated for each in results))
        self.usage += spent
        self.call.server.metrics.count_tokens(spent)
        return results

    def _is_one_greedy_token(self) -> bool:
        """Whether the scores of the prompt show the answer as well: what lm-evaluation-harness asks for."""
        one = self.decoding.max_tokens == 1 and self.decoding.choices == 1 and not self.decoding.stop
        return one and self.decoding.sampling.is_greedy

    async def _submit(self, prompt: _Prompt) -> list[Ticket]:
        """Queue a prompt; those after the first wait while the queue is full."""
        prepared = PreparedAnswer(prompt.ids)
        while True:
            try:
                tickets = await run_in_thread(
                    submit, self.model, prepared, self.decoding, self.decoding.stop, "prompt", discard=cancel_all
                )
            except ApiError as error:
                if error.status != 429 or not self.has_begun:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self.has_begun = True
            for ticket in tickets:
                self.call.resources.callback(ticket.cancel)
            return tickets

    async def _read(self, prompt: _Prompt, ticket: Ticket) -> _Result:
        runtime = self.model.runtime
        stream, pieces, tokens, logprobs = Utf8Stream(), [], [], []
        async for event in read_events(ticket):
            pieces.append(stream.feed(event.bytes_))
            tokens.append(event.token)
            if event.logprob is not None:
                top = tuple((id_, runtime.token_bytes(id_, special=True), value) for id_, value in event.top)
                raw = event.bytes_ or runtime.token_bytes(event.token, special=True)
                logprobs.append(TokenLogprob(event.token, raw, event.logprob, top))
        text = "".join([*pieces, stream.finish()])
        result = _Result(text, finish_reason(ticket), usage_of(ticket))
        if self.scores_prompt:
            ended = [ticket.stop] if ticket.finish is Finish.STOP and isinstance(ticket.stop, int) else []
            ids = [*prompt.ids, *tokens, *ended]
            result.logprobs = self._table(prompt, ids, await self._score(ids))
        elif self.fields.logprobs is not None:
            result.logprobs = _Table(0).add(logprobs).to_json()
        if self.fields.echo:
            result.text = prompt.text + result.text
        return result

    async def _score_only(self, prompt: _Prompt) -> _Result:
        text = prompt.text if self.fields.echo else ""
        result = _Result(text, "length", TokenUsage(len(prompt.ids)))
        if self.scores_prompt:
            result.logprobs = self._table(prompt, prompt.ids, await self._score(prompt.ids))
        return result

    async def _score_and_continue(self, prompt: _Prompt) -> _Result:
        """Score the prompt and, with the most likely next token, continue it in the same pass."""
        runtime = self.model.runtime
        probe = [*prompt.ids, prompt.ids[-1]]  # what stands there does not matter: only what predicts it is evaluated
        scores = await self._score(probe)
        token = int(scores.top_ids[-1, 0])
        scores.logprobs[-1] = scores.top_logprobs[-1, 0]
        is_stop = token in runtime.stop_tokens
        text = "" if is_stop else runtime.token_bytes(token).decode("utf-8", "replace")
        table = self._table(prompt, [*prompt.ids, token], scores)
        return _Result(
            prompt.text + text, "stop" if is_stop else "length", TokenUsage(len(prompt.ids), 0, 1), table
        )  # fmt: skip

    async def _score(self, ids: list[int]) -> ScoredTokens:
        while True:
            try:
                future = self.model.engine.submit_score(
                    ids, top=max(1, self.fields.logprobs or 0), adapters=self.model.adapters
                )
                self.has_begun = True
                self.call.resources.callback(future.cancel)
                return await asyncio.wrap_future(future)
            except EdgetuneError as problem:
                error = problem_error(problem, "prompt")
                if error.status != 429 or not self.has_begun:
                    raise error from None
            await asyncio.sleep(_RETRY_SECONDS)

    def _table(self, prompt: _Prompt, ids: Sequence[int], scores: ScoredTokens) -> dict[str, Any]:
        runtime, most = self.model.runtime, self.fields.logprobs or 0
        table = _Table(0)
        table.add_first(runtime.token_bytes(ids[0], special=True), is_in_text=prompt.bos_length == 0)
        entries = []
        for place, token in enumerate(ids[1:]):
            top = tuple(
                (int(id_), runtime.token_bytes(int(id_), special=True), float(value))
                for id_, value in zip(scores.top_ids[place, :most], scores.top_logprobs[place, :most], strict=True)
            )
            raw = runtime.token_bytes(token, special=True)
            entries.append(TokenLogprob(token, raw, float(scores.logprobs[place]), top))
        return table.add(entries).to_json()

    async def events(
        self, prompts: Sequence[_Prompt], frame: dict[str, Any], *, with_usage: bool
    ) -> AsyncIterator[Event]:
        """Yield chunks: piece by piece for one prompt without scores of it, else a choice at a time."""
        base = {**frame} | ({"usage": None} if with_usage else {})
        if self.scores_prompt or self.decoding.max_tokens == 0 or len(prompts) > 1 or self.decoding.choices > 1:
            for index, result in enumerate(await self.run(prompts)):
                yield Event({**base, "choices": [result.choice(index)]})
        else:
            async for text, logprobs, finish in self._pieces(prompts[0]):
                choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
                yield Event({**base, "choices": [choice]})
        if with_usage:
            yield Event({**base, "choices": [], "usage": usage_object(self.usage)})
        yield DONE

    async def _pieces(self, prompt: _Prompt) -> AsyncIterator[tuple[str, dict[str, Any] | None, str | None]]:
        runtime = self.model.runtime
        (ticket,) = await self._submit(prompt)
        stream, at = Utf8Stream(), len(prompt.text) if self.fields.echo else 0
        if self.fields.echo:
            yield prompt.text, None, None
        async for event in read_events(ticket):
            text, logprobs = stream.feed(event.bytes_), None
            if event.logprob is not None:
                top = tuple((id_, runtime.token_bytes(id_, special=True), value) for id_, value in event.top)
                raw = event.bytes_ or runtime.token_bytes(event.token, special=True)
                logprobs = _Table(at).add([TokenLogprob(event.token, raw, event.logprob, top)]).to_json()
            at += len(text)
            if text or logprobs:
                yield text, logprobs, None
        yield stream.finish(), None, finish_reason(ticket)
        self.usage = usage_of(ticket)
        self.call.server.metrics.count_tokens(self.usage)


class _Table:
    """The four lists of log-probabilities that OpenAI's completions have."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._stream = Utf8Stream()
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_first(self, raw: bytes, *, is_in_text: bool) -> None:
        """Add the first token of a text, which nothing predicts."""
        self._place(raw if is_in_text else b"")
        self._tokens.append(_readable(raw))
        self._logprobs.append(None)
        self._top.append(None)

    def add(self, entries: Sequence[TokenLogprob]) -> _Table:
        """Add tokens; the token itself is always among the most likely ones."""
        for entry in entries:
            self._place(entry.raw)
            name = _readable(entry.raw)
            self._tokens.append(name)
            self._logprobs.append(entry.logprob)
            top: dict[str, float] = {}
            for _, raw, logprob in entry.top:
                top.setdefault(_readable(raw), logprob)  # of two tokens with one text, the more likely
            top.setdefault(name, entry.logprob)
            self._top.append(top)
        return self

    def _place(self, raw: bytes) -> None:
        self._offsets.append(self._offset)
        self._offset += len(self._stream.feed(raw))

    def to_json(self) -> dict[str, Any]:
        """Return the lists."""
        return {
            "tokens": self._tokens, "token_logprobs": self._logprobs, "top_logprobs": self._top,
            "text_offset": self._offsets,
        }  # fmt: skip


def _readable(raw: bytes) -> str:
    """Return a token as text; a part of a character as OpenAI writes it: bytes:\\xf0\\x9f."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


ROUTES = (RouteSpec("POST", "/v1/completions", completions, openai_error, CompletionRequest),)
