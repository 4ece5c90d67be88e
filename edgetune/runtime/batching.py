"""Several answers at once: rows are taken up while there is room, take a step together, and leave when they end.

Generating reads all weights for each step, however many rows take it. The next prompt takes the place of an answer that
has ended, so that the rows stay full to the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.interface import Completion, Finish, Sampling
from edgetune.runtime.sampling import Sampler

MAX_SEQUENCES = 16  # rows at once: from here on a row more costs what it brings (docs/benchmarks.md)


class ScoreRequest(NamedTuple):
    """A row that is scored: its number, the ids that are evaluated, and the places of those whose logits are wanted."""

    number: int
    ids: NDArray[np.int32]
    wanted: NDArray[np.int64]

    @classmethod
    def of(cls, number: int, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Self:
        """By the positions that are predicted."""
        return cls(number, ids[: positions[-1]], positions - 1)


def grouped(rows: Sequence[ScoreRequest], fits: Callable[[list[ScoreRequest]], bool]) -> list[list[ScoreRequest]]:
    """Rows that follow one another, as many at once as fit."""
    groups: list[list[ScoreRequest]] = []
    for row in rows:
        if groups and fits([*groups[-1], row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class SequenceBatch(Protocol):
    """The state of several texts in a library. They are numbered from 0 without gaps."""

    size: int
    """How many there may be at once."""

    def admit(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """One more row, behind the others: the logits [V] after its last token."""

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """A token for each row: the logits [rows, V] after it, a view of the library's own buffer."""

    def drop(self, row: int) -> None:
        """A row is over; the last one takes its number."""

    def close(self) -> None:
        """Give the memory back."""


class SingleSequence:
    """Of a runtime that evaluates one text at a time."""

    size = 1

    def __init__(
        self,
        prefill: Callable[[NDArray[np.int32]], NDArray[np.float32]],
        step: Callable[[int, int], NDArray[np.float32]],
    ) -> None:
        self._prefill, self._step = prefill, step
        self._position = 0

    def admit(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """See Rows."""
        self._position = len(prompt)
        return self._prefill(prompt)

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See Rows."""
        self._position += 1
        return self._step(tokens[0], self._position - 1)[None]

    def drop(self, row: int) -> None:
        """Nothing is to be done: the next prompt begins anew."""

    def close(self) -> None:
        """Nothing is kept."""


class Prompt(NamedTuple):
    """A text to be continued: its number, its ids, and by how many tokens at most."""

    number: int
    ids: NDArray[np.int32]
    max_tokens: int


@dataclass
class Rules:
    """When an answer ends."""

    sampling: Sampling
    stop_tokens: frozenset[int]
    context: int


@dataclass
class _Writing:
    """An answer that is being written."""

    prompt: Prompt
    rules: Rules
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Choose the next token by logits [V]; whether another one is to follow."""
        position = len(self.prompt.ids) + len(self.tokens)
        token = self.sampler.choose(logits)
        if token in self.rules.stop_tokens:
            self.finish = Finish.STOP
        else:
            self.tokens.append(token)
            if position >= self.rules.context:
                self.finish = Finish.CONTEXT
            elif len(self.tokens) == self.prompt.max_tokens:
                self.finish = Finish.LENGTH
        return self.finish is None


def complete(rows: SequenceBatch, prompts: Sequence[Prompt], rules: Rules) -> Iterator[tuple[int, Completion]]:
    """(number, answer) of each prompt, as they end."""
    waiting = deque(prompts)
    active: list[_Writing] = []
    try:
        while waiting or active:
            while waiting and len(active) < rows.size:
                writing = _Writing(waiting.popleft(), rules, Sampler(rules.sampling))
                active.append(writing)
                if not (writing.prompt.max_tokens > 0 and writing.take(rows.admit(writing.prompt.ids))):
                    yield _ended(rows, active, len(active) - 1)
            if active:
                logits = rows.step([writing.tokens[-1] for writing in active])
                for row in reversed(range(len(active))):  # the last one, which takes the place, has had its turn
                    if not active[row].take(logits[row]):
                        yield _ended(rows, active, row)
    finally:
        for writing in active:
            writing.sampler.close()
        rows.close()


def _ended(rows: SequenceBatch, active: list[_Writing], row: int) -> tuple[int, Completion]:
    writing, last = active[row], active.pop()
    if last is not writing:
        active[row] = last
    if writing.prompt.max_tokens > 0:
        rows.drop(row)
    writing.sampler.close()
    return writing.prompt.number, Completion(writing.tokens, writing.finish or Finish.LENGTH)


def in_order(found: Iterator[tuple[int, Completion]]) -> Iterator[Completion]:
    """Each as soon as it and those before it are there."""
    ready: dict[int, Completion] = {}
    turn = 0
    for number, completion in found:
        ready[number] = completion
        while turn in ready:
            yield ready.pop(turn)
            turn += 1
