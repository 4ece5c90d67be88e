"""Answers whose tokens are guessed ahead by an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.data.answer_frame import NO_FRAME
from edgetune.data.chat import Message
from edgetune.runtime import Answer, Generation, GenerationRequest, Runtime, Sampling, Ticket
from edgetune.runtime.batching import Event
from edgetune.runtime.engine import Engine
from edgetune.runtime.ngrams import path_beside
from edgetune.runtime.slots import Speculation


def can_guess(file: Path, speculation: Speculation, sampling: Sampling) -> bool:
    """Whether tokens of an answer can be guessed; warns where a draft model has nothing to do."""
    if speculation.draft is not None and not sampling.is_greedy:
        console.warn("--draft guesses nothing where tokens are drawn at random; give --temperature 0")
    has_source = speculation.draft is not None or (speculation.uses_table and path_beside(file).is_file())
    return has_source and sampling.is_greedy


def begin_answer(
    runtime: Runtime, engine: Engine | None, text: str, messages: Sequence[Message] | None,
    template_options: Mapping[str, Any], sampling: Sampling, max_tokens: int,
    adapters: Sequence[tuple[str, float]] = (),
) -> tuple[Answer, Ticket | None]:  # fmt: skip
    """Begin the answer to a conversation, or the continuation of `text` without one.

    With an engine, tokens are guessed, and the ticket comes with the answer: its `usage` counts the guesses. Without
    one, the adapters are those that the runtime uses.
    """
    if engine is None and messages is None:
        return runtime.complete(text, sampling=sampling, max_tokens=max_tokens), None
    if engine is None:
        assert messages is not None
        return runtime.chat(
            messages, sampling=sampling, max_tokens=max_tokens, template_options=template_options
        ), None  # fmt: skip
    ids, frame = runtime.tokenize(text) if messages is None else [], NO_FRAME
    if messages is not None:
        ids = runtime.tokenize_chat(messages, template_options=template_options)
        frame = runtime.answer_frame(messages, template_options=template_options)
    ticket = engine.submit(GenerationRequest(ids, sampling, max_tokens, adapters=tuple(adapters)))
    return Answer(ids, Generation(_events(ticket)), runtime.token_bytes, frame), ticket


def _events(ticket: Ticket) -> Iterator[Event]:
    for event in ticket:
        yield 0, event.token
    if ticket.finish is not None:
        yield 0, ticket.finish


def describe_guesses(ticket: Ticket) -> str:
    """Return how many tokens were guessed, and where another batch might have chosen another one."""
    usage = ticket.usage
    ties = f"; {usage.near_ties} near ties" if usage.near_ties else ""
    return f"{usage.guessed_tokens} of {usage.generated_tokens} tokens were guessed{ties}"
