"""The places of an engine, each with one sequence at a time, and one turn after another for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.runtime.batching import SequenceBatch
from edgetune.runtime.sampling import Sampler, SamplerVocabulary, Sampling

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that has been loaded on a model; each loading is another one.

    Attributes:
        path: Its file.
        pointer: The runtime's own handle.
    """

    path: Path
    pointer: Any


@dataclass(frozen=True)
class SlotTask:
    """A sequence that a slot continues.

    Attributes:
        ids: Prompt [n], checked.
        sampling: How tokens are chosen.
        logprobs: As in `GenerationRequest`.
        mask: A bit for each token that may come first, the lowest of each word first u32 [ceil(V / 32)]; None permits
            all.
        adapters: Adapters, each with the weight that multiplies its change.
        lookup: As in `GenerationRequest`.
        speculates: Whether tokens are guessed from the table or by the draft model of the slots.
    """

    ids: NDArray[np.int32]
    sampling: Sampling
    logprobs: int | None
    mask: NDArray[np.uint32] | None = None
    adapters: tuple[tuple[LoadedAdapter, float], ...] = ()
    lookup: int = 0
    speculates: bool = True


@dataclass(frozen=True)
class Speculation:
    """How an engine guesses tokens ahead, which it verifies several at a time. Guesses do not change answers.

    Attributes:
        uses_table: Whether the table of n-grams beside the file is used (`FILE.ngrams`).
        draft: A small model of the same vocabulary, which guesses where the table does not.
        costs: Time of batches of 1, 2, 4, 8, 16 and 32 rows, relative to the first, as `edgetune fit` measures it.
        adapts: Whether times that are measured while answers are generated go before `costs`, and guessing stops where
            it has cost time.
    """

    uses_table: bool = True
    draft: Path | None = None
    costs: tuple[float, ...] | None = None
    adapts: bool = True


NO_SPECULATION = Speculation(uses_table=False)
SPECULATION = Speculation()


class ChosenToken(NamedTuple):
    """The next token of the sequence in a slot."""

    slot: int
    token: int
    bytes_: bytes
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    was_guessed: bool = False
    is_near_tie: bool = False
    """Whether another token had nearly the same logit beside guesses: it was chosen again without any."""


class Slots(ABC):
    """The places of an engine. One thread calls all methods but `interrupt`."""

    capacity: int
    """Number of slots; they are numbered from 0."""
    admits_in_runtime_cache: bool
    """See `SequenceBatch`."""
    steps_in_runtime_cache: bool

    drafted: int = 0
    """Tokens that have been guessed and verified, right or wrong."""

    @abstractmethod
    def start(self, task: SlotTask) -> tuple[int, int]:
        """Take a free slot for a sequence; return its number and how many tokens of the prompt it has in its cache.

        Raises:
            RuntimeProblem: The task cannot be done; no slot is taken.
        """

    @abstractmethod
    def turn(self) -> list[ChosenToken]:
        """Evaluate one batch, and return the next token of each sequence that has one: none in the midst of prompts."""

    @abstractmethod
    def set_mask(self, slot: int, mask: NDArray[np.uint32]) -> None:
        """State which tokens may come next in a slot whose task has a mask."""

    @property
    def has_prompts(self) -> bool:
        """Whether prompts, or parts of them, have not been evaluated yet."""
        return False

    @abstractmethod
    def stop(self, slot: int) -> None:
        """Free a slot."""

    def forget_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that is about to be freed; no task uses it."""
        return

    def interrupt(self) -> None:
        """Let the turn in progress return early, without tokens, if it takes long. Any thread may call this."""
        return

    def resume(self) -> None:
        """Let turns go on after `interrupt`."""
        return

    @abstractmethod
    def close(self) -> None:
        """Free the memory of all slots."""


class BatchSlots(Slots):
    """Slots over a `SequenceBatch`: a turn evaluates one prompt as a whole, or one token of every sequence."""

    def __init__(
        self, batch: SequenceBatch, vocabulary: SamplerVocabulary, token_bytes: Callable[[int], bytes]
    ) -> None:
        self.capacity = batch.capacity
        self.admits_in_runtime_cache = batch.admits_in_runtime_cache
        self.steps_in_runtime_cache = batch.steps_in_runtime_cache
        self._batch, self._vocabulary, self._token_bytes = batch, vocabulary, token_bytes
        self._free = list(reversed(range(self.capacity)))
        self._waiting: deque[_Row] = deque()
        self._active: list[_Row] = []
        """In the order of the numbers of the batch."""
        self._has_admitted = False

    @override
    def start(self, task: SlotTask) -> tuple[int, int]:
        sampler = Sampler(task.sampling, self._vocabulary)
        sampler.accept_prompt(task.ids.tolist())
        slot = self._free.pop()
        self._waiting.append(_Row(slot, task, sampler))
        return slot, self._batch.match(task.ids)

    @property
    @override
    def has_prompts(self) -> bool:
        return bool(self._waiting)

    @override
    def turn(self) -> list[ChosenToken]:
        # prompts take turns with the tokens of running answers
        if self._waiting and not (self._has_admitted and self._active):
            row = self._waiting.popleft()
            logits = self._batch.admit(row.task.ids)
            self._active.append(row)
            self._has_admitted = True
            return [self._choose(row, logits)]
        self._has_admitted = False
        if not self._active:
            return []
        rows = self._batch.step([row.token for row in self._active])
        return [self._choose(row, logits) for row, logits in zip(self._active, rows, strict=True)]

    def _choose(self, row: _Row, logits: F32) -> ChosenToken:
        row.token = row.sampler.choose(logits, None if row.mask is None else unpack_mask(row.mask, len(logits)))
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if row.task.logprobs is not None:
            logprob, top = log_probabilities(logits, row.token, row.task.logprobs)
        return ChosenToken(row.slot, row.token, self._token_bytes(row.token), logprob, top)

    @override
    def set_mask(self, slot: int, mask: NDArray[np.uint32]) -> None:
        next(row for row in self._active if row.slot == slot).mask = mask

    @override
    def stop(self, slot: int) -> None:
        for row in [row for row in self._waiting if row.slot == slot]:
            self._waiting.remove(row)
            row.sampler.close()
        for number, row in enumerate(self._active):
            if row.slot == slot:
                row.sampler.close()
                last = self._active.pop()
                if number < len(self._active):
                    self._active[number] = last
                self._batch.retire(number)
                break
        self._free.append(slot)

    @override
    def close(self) -> None:
        for row in (*self._waiting, *self._active):
            row.sampler.close()
        self._batch.close()


class _Row:
    """A sequence in a slot."""

    __slots__ = ("mask", "sampler", "slot", "task", "token")

    def __init__(self, slot: int, task: SlotTask, sampler: Sampler) -> None:
        self.slot, self.task, self.sampler = slot, task, sampler
        self.mask = task.mask
        self.token = -1


def unpack_mask(bits: NDArray[np.uint32], count: int) -> NDArray[np.bool_]:
    """Return the first `count` bits of a mask, the lowest of each word first, as booleans."""
    return np.unpackbits(bits.view(np.uint8), bitorder="little", count=count).view(np.bool_)


def log_probabilities(logits: F32, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and the `count` most likely tokens with theirs, for logits [V]."""
    values = logits.astype(np.float64)
    largest = values.max()
    total = largest + np.log(np.exp(values - largest).sum())
    best = np.argpartition(-values, min(count, len(values)) - 1)[:count] if count else np.empty(0, np.int64)
    ordered = sorted(best.tolist(), key=lambda id_: (-values[id_], id_))
    return float(values[token] - total), tuple((id_, float(values[id_] - total)) for id_ in ordered)
