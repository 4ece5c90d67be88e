"""Continuous batching: admit prompts while there is room, decode in lockstep, retire sequences that have finished.

A decoding step reads all weights once, however many sequences take part in it, so the next prompt takes the place of a
finished sequence at once. A single answer is a batch of one sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.runtime.sampling import Sampler, SamplerVocabulary, Sampling

EndCheck = Callable[[int, int], bool]
"""Called with (index of the prompt, new token); returns whether the answer ends with it."""

MAX_SEQUENCES = 16  # decoded at once: beyond that, one more costs as much time as it saves (docs/benchmarks.md)


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model generated a stop token."""
    LENGTH = "length"
    """`max_tokens` tokens were generated."""
    CONTEXT = "context"
    """The context is full."""
    CANCEL = "cancel"
    """The request was cancelled."""


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        tokens: Generated token ids, without the stop token.
        finish: Why the answer ended.
    """

    tokens: list[int]
    finish: Finish


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue: its index in the batch, its ids [n], and the maximum number of new tokens."""

    index: int
    ids: NDArray[np.int32]
    max_tokens: int


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are chosen, and what ends a sequence."""

    sampling: Sampling
    stop_tokens: frozenset[int]
    context: int
    """Tokens that a prompt and its answer may have together."""
    vocabulary: SamplerVocabulary
    is_ended: EndCheck | None = None
    """Whether the answer to a prompt ends with its newest token, beside the stop tokens."""


class SequenceBatch(ABC):
    """Key-value caches of several sequences. The active sequences are numbered from 0 without gaps."""

    capacity: int
    """Maximum number of active sequences."""
    admits_in_runtime_cache: ClassVar[bool] = False
    """Whether `admit` evaluates the prompt in the runtime's own cache, in which it scores texts."""
    steps_in_runtime_cache: ClassVar[bool] = False
    """Whether the sequences themselves are in that cache."""

    @abstractmethod
    def admit(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """Evaluate `prompt` as a new sequence with the next number; return the logits [V] after its last token."""

    def match(self, prompt: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt `admit` would take from the cache of an earlier sequence."""
        return 0

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each sequence; return the logits [sequences, V] after it, a view of a reused buffer."""

    @abstractmethod
    def retire(self, number: int) -> None:
        """Drop a sequence; the last sequence takes its number."""

    @abstractmethod
    def close(self) -> None:
        """Free the caches."""


class SingleSequence(SequenceBatch):
    """The one sequence of a runtime's own cache: nothing is allocated for it."""

    capacity = 1
    admits_in_runtime_cache = steps_in_runtime_cache = True

    def __init__(
        self,
        prefill: Callable[[NDArray[np.int32]], NDArray[np.float32]],
        step: Callable[[int, int], NDArray[np.float32]],
    ) -> None:
        self._prefill, self._step = prefill, step
        self._position = 0

    @override
    def admit(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        self._position = len(prompt)
        return self._prefill(prompt)

    @override
    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._position += 1
        return self._step(tokens[0], self._position - 1)[None]

    @override
    def retire(self, number: int) -> None:
        """Do nothing: `prefill` clears the cache."""

    @override
    def close(self) -> None:
        """Do nothing: the cache belongs to the runtime."""


class _Sequence:
    """An answer that is being generated."""

    __slots__ = ("index", "position", "remaining", "sampler", "token")

    def __init__(self, prompt: Prompt, options: DecodingOptions) -> None:
        self.index = prompt.index
        self.position = len(prompt.ids)
        self.remaining = prompt.max_tokens
        self.sampler = Sampler(options.sampling, options.vocabulary)
        self.sampler.accept_prompt(prompt.ids.tolist())
        self.token = -1

    def choose(self, logits: NDArray[np.float32], options: DecodingOptions) -> Finish | None:
        """Choose the next `token` from logits [V]; return why the sequence ends with it, or None."""
        self.token = self.sampler.choose(logits)
        if self.token in options.stop_tokens:
            return Finish.STOP
        self.remaining -= 1
        self.position += 1
        if self.position > options.context:
            return Finish.CONTEXT
        return Finish.LENGTH if self.remaining == 0 else None


Event = tuple[int, int | Finish]
"""(index of the prompt, its next token or why its answer ended)."""


def decode(batch: SequenceBatch, prompts: Sequence[Prompt], options: DecodingOptions) -> Generator[Event, None, None]:
    """Continue all prompts; yield each token as soon as it is chosen, and last why the answer ended.

    A stop token is not yielded. `batch` is closed at the end.
    """
    waiting = deque(prompts)
    active: list[_Sequence] = []
    try:
        while waiting or active:
            if waiting and len(active) < batch.capacity:
                prompt = waiting.popleft()
                if prompt.max_tokens <= 0:
                    yield prompt.index, Finish.LENGTH
                    continue
                active.append(_Sequence(prompt, options))
                first, logits = len(active) - 1, batch.admit(prompt.ids)[None]
            else:
                first, logits = 0, batch.step([sequence.token for sequence in active])
            # backwards, so that the last sequence, which takes the number of a retired one, has had its turn
            for number in reversed(range(first, len(active))):
                sequence = active[number]
                finish = sequence.choose(logits[number - first], options)
                if finish is not Finish.STOP:
                    yield sequence.index, sequence.token
                    if options.is_ended is not None and options.is_ended(sequence.index, sequence.token):
                        finish = Finish.STOP
                if finish is not None:
                    _retire(batch, active, number)
                    yield sequence.index, finish
    finally:
        for sequence in active:
            sequence.sampler.close()
        batch.close()


def _retire(batch: SequenceBatch, active: list[_Sequence], number: int) -> None:
    active[number].sampler.close()
    last = active.pop()
    if number < len(active):
        active[number] = last
    batch.retire(number)


def completions(events: Generator[Event, None, None]) -> Iterator[Completion]:
    """Yield the completions in the order of the prompts, each as soon as it and all before it are finished."""
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    finished: dict[int, Completion] = {}
    due = 0
    with closing(events):
        for index, event in events:
            if not isinstance(event, Finish):
                tokens[index].append(event)
                continue
            finished[index] = Completion(tokens.pop(index, []), event)
            while due in finished:
                yield finished.pop(due)
                due += 1
