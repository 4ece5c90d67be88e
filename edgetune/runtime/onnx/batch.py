"""Several sequences in one forward pass of a graph.

Decoding: a prompt is evaluated alone, in the runtime's own decoder, and its keys and values are copied into the batch.
GroupQueryAttention takes the length of each sequence from its mask, so every sequence starts at position 0 of the
buffer. A cache that grows by concatenation is aligned at its end, with masked padding before the shorter sequences.

Scoring: short texts of similar length share a pass, padded at their end, which causal attention does not see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.runtime.batching import MAX_SEQUENCES, SequenceBatch
from edgetune.runtime.onnx.decoder import bind_input, bind_output, visible
from edgetune.runtime.onnx.graph_interface import CacheTensor, GraphInterface, ValueInfo
from edgetune.runtime.onnx.prefix_cache import LEAST_COMMON, Past, PrefixCache, count_common

_CACHE_BYTES = 256 << 20  # keys and values of all sequences together
_PADDED_TOKENS = 256  # tokens of a scoring pass, padding included: more at once are hardly faster
_MAX_PADDING = 1.2  # tokens of a scoring pass with padding, relative to those without
F32 = NDArray[np.float32]


def sequence_capacity(interface: GraphInterface, count: int, length: int) -> int:
    """Return how many of `count` sequences of `length` tokens fit into memory; 1 for a graph that takes one row."""
    if not interface.takes_batch:
        return 1
    token = sum(cache.heads * cache.head_size * np.dtype(cache.past.dtype).itemsize for cache in interface.caches)
    buffers = 1 if interface.is_shared else 2
    return max(1, min(count, MAX_SEQUENCES, _CACHE_BYTES // (buffers * token * length)))


class OnnxSequences(SequenceBatch):
    """Sequences that share the passes of a session.

    `length` counts the prefix. `prefill` evaluates a prompt, behind the first of its tokens whose keys and values it is
    given, and returns its logits; `past` returns the keys and values of prefix and prompt, and `failure` makes an error
    of a position and an exception of ONNX Runtime. `keeps_prefixes`: prompts continue the caches of earlier sequences
    that begin alike.
    """

    admits_in_runtime_cache = True

    def __init__(
        self,
        session: Any,
        interface: GraphInterface,
        capacity: int,
        length: int,
        prefill: Callable[[NDArray[np.int32], int, Past], F32],
        past: Callable[[int], Past],
        failure: Callable[[int, Exception], Exception],
        vocabulary_size: int,
        *,
        keeps_prefixes: bool = False,
    ) -> None:
        self.capacity = capacity
        self._kept = PrefixCache(_CACHE_BYTES) if keeps_prefixes else None
        self._texts: list[list[int]] = []
        """The tokens of each sequence whose keys and values are in the cache, behind the prefix."""
        self._before = 0
        self._vocabulary_size = vocabulary_size
        self._session, self._interface = session, interface
        self._prefill, self._past, self._failure = prefill, past, failure
        self._binding = session.io_binding()
        self._lengths: list[int] = []
        self._logits = np.zeros((capacity, 1, interface.vocabulary_size), interface.logits.dtype)
        cache = _SharedBatchCache if interface.is_shared else _GrowingBatchCache
        self._cache: _BatchCache = cache(interface.caches, capacity, length)
        self._range = np.array([0, 1], interface.range.dtype) if interface.range else None
        self._inputs: list[NDArray[Any]] = []  # kept alive while the session reads them

    @override
    def admit(self, prompt: NDArray[np.int32]) -> F32:
        logits = self._prefill(prompt, *self._find_kept(prompt))
        self._texts.append(prompt.tolist())
        past = self._past(len(prompt))
        self._before = past[0].shape[1] - len(prompt)
        self._cache.add(past, self._lengths)
        self._lengths.append(past[0].shape[1])
        return logits

    @override
    def match(self, prompt: NDArray[np.int32]) -> int:
        if self._kept is None:
            return 0
        running = max((count_common(prompt, text) for text in self._texts), default=0)
        common = min(max(self._kept.match(prompt), running), len(prompt) - 1)
        return common if common >= LEAST_COMMON else 0

    def _find_kept(self, prompt: NDArray[np.int32]) -> tuple[int, Past]:
        """Return how many tokens of a prompt are in a cache, and their keys and values behind those of the prefix."""
        common = self.match(prompt)
        if not common or self._kept is None:
            return 0, []
        found = next((n for n, text in enumerate(self._texts) if count_common(prompt, text) >= common), None)
        past = self._kept.find(prompt) if found is None else self._cache.past(found, self._lengths)
        return common, [values[:, : self._before + common] for values in past]

    @override
    def step(self, tokens: Sequence[int]) -> F32:
        interface, count = self._interface, len(tokens)
        lengths = np.array(self._lengths)
        mask = self._cache.mask(lengths)
        given: list[tuple[ValueInfo | None, NDArray[Any] | None]] = [
            (interface.ids, np.array(tokens)[:, None]),
            (interface.mask, mask),
        ]
        given += [(interface.positions, lengths[:, None]), (interface.range, self._range)]
        self._inputs = []
        for value, array in given:
            if value is not None and array is not None:
                self._inputs.append(np.ascontiguousarray(array, value.dtype))
                bind_input(self._binding, value, array.shape, self._inputs[-1])
        bind_output(self._binding, interface.logits, (count, 1, interface.vocabulary_size), self._logits)
        self._cache.bind(self._binding, count, mask.shape[1])
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # noqa: BLE001 - its exceptions have no other common base
            raise self._failure(mask.shape[1], error) from None
        self._cache.advance()
        self._lengths = [length + 1 for length in self._lengths]
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        return visible(self._logits[:count, 0].astype(np.float32, copy=False), self._vocabulary_size)

    @override
    def retire(self, number: int) -> None:
        if self._kept is not None:
            past = [values.copy() for values in self._cache.past(number, self._lengths)]
            self._kept.keep(np.array(self._texts[number], np.int32), past)
        self._cache.remove(number, self._lengths)
        self._lengths[number], self._texts[number] = self._lengths[-1], self._texts[-1]
        self._lengths.pop()
        self._texts.pop()

    @override
    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()


class _BatchCache(ABC):
    """Keys and values of the sequences; `lengths` are those before a change."""

    @abstractmethod
    def add(self, past: Past, lengths: Sequence[int]) -> None:
        """Append a sequence."""

    @abstractmethod
    def remove(self, number: int, lengths: Sequence[int]) -> None:
        """Remove a sequence; the last one takes its place."""

    @abstractmethod
    def past(self, number: int, lengths: Sequence[int]) -> Past:
        """Return the keys and values of a sequence, as views."""

    @abstractmethod
    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the mask [sequences, total] of a step: 1 where a sequence has a key, including the new one."""

    @abstractmethod
    def bind(self, binding: Any, count: int, total: int) -> None:
        """Bind the buffers for a step of `count` sequences, of which the longest has `total` keys after it."""

    @abstractmethod
    def advance(self) -> None:
        """Note that a step has been done."""


class _SharedBatchCache(_BatchCache):
    """Past and present in one buffer [capacity, heads, length, head_size]; each sequence starts at position 0."""

    def __init__(self, caches: tuple[CacheTensor, ...], capacity: int, length: int) -> None:
        self._caches = caches
        shapes = [(capacity, cache.heads, length, cache.head_size) for cache in caches]
        self._buffers = [np.zeros(shape, cache.past.dtype) for shape, cache in zip(shapes, caches, strict=True)]
        self._bound = 0

    @override
    def add(self, past: Past, lengths: Sequence[int]) -> None:
        for buffer, values in zip(self._buffers, past, strict=True):
            buffer[len(lengths), :, : values.shape[1]] = values

    @override
    def remove(self, number: int, lengths: Sequence[int]) -> None:
        if number < len(lengths) - 1:
            for buffer in self._buffers:
                buffer[number, :, : lengths[-1]] = buffer[len(lengths) - 1, :, : lengths[-1]]

    @override
    def past(self, number: int, lengths: Sequence[int]) -> Past:
        return [buffer[number, :, : lengths[number]] for buffer in self._buffers]

    @override
    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64)

    @override
    def bind(self, binding: Any, count: int, total: int) -> None:
        if count == self._bound:
            return
        for cache, buffer in zip(self._caches, self._buffers, strict=True):
            bind_input(binding, cache.past, (count, *buffer.shape[1:]), buffer)
            bind_output(binding, cache.present, (count, *buffer.shape[1:]), buffer)
        self._bound = count

    @override
    def advance(self) -> None:
        pass


class _GrowingBatchCache(_BatchCache):
    """Two buffers that swap roles after each step; all sequences end at the same position, padded with zeros before."""

    def __init__(self, caches: tuple[CacheTensor, ...], capacity: int, length: int) -> None:
        self._caches = caches
        sizes = [capacity * cache.heads * length * cache.head_size for cache in caches]
        self._pasts, self._presents = (
            [np.zeros(size, cache.past.dtype) for size, cache in zip(sizes, caches, strict=True)] for _ in range(2)
        )
        self._total = 0

    @override
    def add(self, past: Past, lengths: Sequence[int]) -> None:
        self._align([*range(len(lengths)), -1], [*lengths, past[0].shape[1]], len(lengths), past)

    @override
    def remove(self, number: int, lengths: Sequence[int]) -> None:
        kept = list(range(len(lengths)))
        kept[number] = kept[-1]
        self._align(kept[:-1], [lengths[old] for old in kept[:-1]], len(lengths))

    def _align(self, kept: Sequence[int], lengths: Sequence[int], before: int, past: Past | None = None) -> None:
        """Copy the sequences `kept` of the `before` old ones, aligned at their end; -1 stands for `past`."""
        old_total, self._total = self._total, max(lengths, default=0)
        for index, cache in enumerate(self._caches):
            old = _as_cache(self._pasts[index], cache, before, old_total)
            new = _as_cache(self._presents[index], cache, len(kept), self._total)
            for number, (source, length) in enumerate(zip(kept, lengths, strict=True)):
                new[number, :, : self._total - length] = 0
                values = past[index] if past is not None and source < 0 else old[source, :, old_total - length :]
                new[number, :, self._total - length :] = values
        self.advance()

    @override
    def past(self, number: int, lengths: Sequence[int]) -> Past:
        begin = self._total - lengths[number]
        return [
            _as_cache(past, cache, len(lengths), self._total)[number, :, begin:]
            for past, cache in zip(self._pasts, self._caches, strict=True)
        ]

    @override
    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return (np.arange(self._total + 1) >= self._total - lengths[:, None]).astype(np.int64)

    @override
    def bind(self, binding: Any, count: int, total: int) -> None:
        for cache, past, present in zip(self._caches, self._pasts, self._presents, strict=True):
            bind_input(binding, cache.past, (count, cache.heads, total - 1, cache.head_size), past)
            bind_output(binding, cache.present, (count, cache.heads, total, cache.head_size), present)
        self._total = total

    @override
    def advance(self) -> None:
        self._pasts, self._presents = self._presents, self._pasts


def _as_cache(buffer: NDArray[Any], cache: CacheTensor, count: int, total: int) -> NDArray[Any]:
    return buffer[: count * cache.heads * total * cache.head_size].reshape(count, cache.heads, total, cache.head_size)


@dataclass(frozen=True)
class ScoreRequest:
    """A text to score: its index, the ids that are evaluated, and the indices of those whose logits are returned."""

    index: int
    ids: NDArray[np.int32]
    outputs: NDArray[np.int64]

    @classmethod
    def at(cls, index: int, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Self:
        """Return the request for the logits that predict the tokens at `positions`."""
        return cls(index, ids[: positions[-1]], positions - 1)


class PaddedScoring:
    """Scores several short texts in one pass; at most `outputs` rows of logits each."""

    def __init__(
        self,
        session: Any,
        interface: GraphInterface,
        outputs: int,
        vocabulary_size: int | None = None,
        prefix: Sequence[NDArray[Any]] = (),
    ) -> None:
        """Score texts behind `prefix`; of each row of logits, `vocabulary_size` are returned (all by default)."""
        self._session, self._interface, self._outputs = session, interface, outputs
        self._vocabulary_size = vocabulary_size or interface.vocabulary_size
        self._prefix = prefix

    def groups(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        """Group texts of similar length whose padding and unwanted logits are within the bounds."""
        # GroupQueryAttention continues a cache with several tokens of one row at a time alone
        continues = bool(self._prefix) and self._interface.is_shared
        if continues or not self._interface.takes_batch:
            return [[request] for request in requests]
        groups: list[list[ScoreRequest]] = []
        for request in sorted(requests, key=lambda request: len(request.ids)):
            if groups and self._fits([*groups[-1], request]):
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _fits(self, group: list[ScoreRequest]) -> bool:
        first, end = self._output_range(group)
        padded = len(group) * max(len(request.ids) for request in group)
        outputs = len(group) * (end - first) if self._interface.range else padded
        return (
            len(group) <= MAX_SEQUENCES
            and padded <= min(_PADDED_TOKENS, _MAX_PADDING * sum(len(request.ids) for request in group))
            and outputs <= min(self._outputs, _MAX_PADDING * sum(len(request.outputs) for request in group))
        )

    @staticmethod
    def _output_range(group: Sequence[ScoreRequest]) -> tuple[int, int]:
        """Return the range (first, end) of tokens that contains the outputs of all texts."""
        return min(int(each.outputs[0]) for each in group), max(int(each.outputs[-1]) for each in group) + 1

    def score(self, group: Sequence[ScoreRequest]) -> Iterator[tuple[int, F32]]:
        """Yield (index, logits [m, V]) of each text of a group."""
        interface = self._interface
        longest = max(len(request.ids) for request in group)
        ids = np.zeros((len(group), longest), interface.ids.dtype)
        for row, request in enumerate(group):
            ids[row, : len(request.ids)] = request.ids
        first, end = self._output_range(group) if interface.range else (0, longest)
        logits = self._run(ids, first, end)
        for row, request in enumerate(group):
            own = request.outputs - first
            is_slice = len(own) == own[-1] - own[0] + 1
            yield request.index, logits[row, own[0] : own[-1] + 1] if is_slice else logits[row, own]

    def _run(self, ids: NDArray[Any], first: int, end: int) -> F32:
        interface, shape = self._interface, ids.shape
        before = self._prefix[0].shape[1] if self._prefix else 0
        given = {interface.ids.name: ids}
        if interface.mask:
            given[interface.mask.name] = np.ones((shape[0], before + shape[1]), interface.mask.dtype)
        if interface.positions:
            own = np.arange(before, before + shape[1], dtype=interface.positions.dtype)
            given[interface.positions.name] = np.tile(own, (shape[0], 1))
        if interface.range:
            given[interface.range.name] = np.array([first, end], interface.range.dtype)
        for index, cache in enumerate(interface.caches):
            room = before + shape[1] if interface.is_shared else before
            past = np.zeros((shape[0], cache.heads, room, cache.head_size), cache.past.dtype)
            if self._prefix:
                past[:, :, :before] = self._prefix[index]
            given[cache.past.name] = past
        (logits,) = self._session.run([interface.logits.name], given)
        found: F32 = logits.astype(np.float32, copy=False)
        return visible(found, self._vocabulary_size)
