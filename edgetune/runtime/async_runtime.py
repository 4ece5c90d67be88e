"""A model for the tasks of an event loop: answers, scores and embeddings that are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.data.answer_frame import NO_FRAME, AnswerFrame, AnswerReader, Part, TextPiece
from edgetune.data.chat import Message
from edgetune.runtime.batching import Finish
from edgetune.runtime.engine import Engine, GenerationRequest, Ticket, Usage
from edgetune.runtime.interface import GREEDY, MAX_TOKENS, Pooling, Runtime
from edgetune.runtime.loading import load
from edgetune.runtime.sampling import Sampling
from edgetune.runtime.text import Utf8Stream
from edgetune.runtime.token_scores import ScoredTokens


class AsyncAnswer(AsyncIterator[str]):
    """The text of an answer in pieces of complete characters, as it is generated; see `Answer`.

    A task that stops reading calls `cancel`; otherwise the answer is generated to its end.

    Attributes:
        tokens: Token ids so far, without the stop token.
        thought: Reasoning so far.
    """

    def __init__(self, ticket: Ticket, runtime: Runtime, frame: AnswerFrame) -> None:
        self.tokens: list[int] = []
        self.thought = ""
        self._ticket, self._runtime = ticket, runtime
        self._parts = self._read(AnswerReader(frame))
        self._pieces: list[str] = []

    @property
    def finish(self) -> Finish | None:
        """Why the answer ended; None while it is being generated."""
        return self._ticket.finish

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self._ticket.usage

    def cancel(self) -> None:
        """End the answer within one token."""
        self._ticket.cancel()

    async def text(self) -> str:
        """Wait for the rest, and return the whole answer, without reasoning."""
        async for _ in self:
            pass
        return "".join(self._pieces)

    async def __anext__(self) -> str:
        """Wait for the next piece of text, which is not empty."""
        async for part in self._parts:
            if not part.is_thought:
                return part.text
        raise StopAsyncIteration

    def parts(self) -> AsyncIterator[Part]:
        """Yield the remaining pieces of reasoning and answer."""
        return self._parts

    async def _read(self, reader: AnswerReader) -> AsyncIterator[Part]:
        stream = Utf8Stream()
        try:
            async for event in self._ticket:
                self.tokens.append(event.token)
                for part in reader.feed(self._piece(event.token, stream)):
                    yield self._kept(part)
            for part in reader.feed(TextPiece(stream.finish())):
                yield self._kept(part)
            for part in reader.finish(is_cut=self.finish is not Finish.STOP):
                yield self._kept(part)
        finally:  # a task that was cancelled
            self._ticket.cancel()

    def _piece(self, token: int, stream: Utf8Stream) -> TextPiece:
        plain = self._runtime.token_bytes(token)
        if not plain and (name := self._runtime.token_bytes(token, special=True)):
            return TextPiece(name.decode("utf-8", "replace"), is_special=True)
        return TextPiece(stream.feed(plain))

    def _kept(self, part: Part) -> Part:
        if part.is_thought:
            self.thought += part.text
        else:
            self._pieces.append(part.text)
        return part


class AsyncRuntime:
    """An exported model whose answers are awaited. An asynchronous context manager.

    Answers to several tasks are generated together.

    Attributes:
        runtime: The model: its metadata, token ids and template. What evaluates the model is called here instead.
    """

    def __init__(self, runtime: Runtime, *, slots: int = 4) -> None:
        """Take over an opened model.

        Args:
            runtime: The model, which is closed with this object.
            slots: Answers that are generated together at most; further ones wait.
        """
        self.runtime = runtime
        self._engine = Engine(runtime, slots=slots, queue=1 << 16)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = MAX_TOKENS,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> AsyncAnswer:
        """Answer a conversation; arguments and errors are those of `Runtime.chat`."""
        ids = self.runtime.tokenize_chat(messages, tools=tools, template_options=template_options)
        frame = self.runtime.answer_frame(messages, tools=tools, template_options=template_options)
        return self._answer(ids, sampling, max_tokens, frame)

    def complete(self, text: str, *, sampling: Sampling = GREEDY, max_tokens: int = MAX_TOKENS) -> AsyncAnswer:
        """Continue plain text, without the chat template."""
        return self._answer(self.runtime.tokenize(text), sampling, max_tokens, NO_FRAME)

    def _answer(self, ids: Sequence[int], sampling: Sampling, max_tokens: int, frame: AnswerFrame) -> AsyncAnswer:
        return AsyncAnswer(self.generate(GenerationRequest(ids, sampling, max_tokens)), self.runtime, frame)

    def generate(self, request: GenerationRequest) -> Ticket:
        """Continue token ids, with stop strings, log-probabilities or a grammar; iterate with `async for`."""
        return self._engine.submit(request)

    async def score(self, ids: Sequence[int], positions: Sequence[int] | None = None, *, top: int = 0) -> ScoredTokens:
        """Return the log-probabilities of tokens in a text; see `Engine.score`."""
        return await asyncio.wrap_future(self._engine.submit_score(ids, positions, top=top))

    async def embed(self, ids: Sequence[int], pooling: Pooling = "mean") -> NDArray[np.float32]:
        """Return the embedding of a text; see `Runtime.embed`."""
        return await asyncio.to_thread(self.runtime.embed, ids, pooling)

    async def close(self) -> None:
        """Cancel what is being generated, and free the model. Idempotent."""
        await asyncio.to_thread(self._engine.close)
        self.runtime.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def load_async(
    path: str | Path, *, threads: int | None = None, context: int | None = None, slots: int = 4
) -> AsyncRuntime:
    """Open an exported GGUF file or ONNX folder for the tasks of an event loop.

    Args:
        path: As for `load`.
        threads: As for `load`.
        context: Tokens that a prompt and its answer may have together.
        slots: Answers that are generated together at most.

    Raises:
        RuntimeProblem: The file does not exist, is not a model, or its library cannot run it.
        ArtifactError: The file is damaged.
    """
    runtime = load(path, threads=threads, context=context)
    try:
        return AsyncRuntime(runtime, slots=slots)
    except BaseException:
        runtime.close()
        raise
