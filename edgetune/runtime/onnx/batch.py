"""Several texts in one graph: a token for each of them in one forward pass.

A prompt is evaluated alone, in the decoder that is there anyway, and its keys and values are copied behind those of
the other rows. GroupQueryAttention counts the mask of each row, whose keys then stand in its buffer from the start; in
a cache that grows by concatenation all rows end at the same place, and what stands before a shorter one is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.batching import MAX_SEQUENCES, ScoreRequest, grouped
from edgetune.runtime.onnx.decoder import bind_input, bind_output
from edgetune.runtime.onnx.graph_interface import CacheTensor, GraphInterface, ValueInfo

_CACHE_BYTES = 256 << 20  # of keys and values of all rows together
_PADDED = 256  # tokens, padding included: more at once are hardly faster
_USEFUL = 1.2  # times as many as without padding
F32 = NDArray[np.float32]
Past = list[NDArray[Any]]
"""Of each cache [heads, length, head_size]."""


def sequence_capacity(interface: GraphInterface, count: int, length: int) -> int:
    """Rows of `length` tokens that memory has room for, of `count`; 1 of a graph that takes no more."""
    if not interface.takes_rows:
        return 1
    token = sum(cache.heads * cache.head_size * np.dtype(cache.past.dtype).itemsize for cache in interface.caches)
    buffers = 1 if interface.is_shared else 2
    return max(1, min(count, MAX_SEQUENCES, _CACHE_BYTES // (buffers * token * length)))


class OnnxSequences:
    """See Rows. `prefill` gives the logits after a prompt, `past` its keys and values; `stopped` says what failed."""

    def __init__(
        self,
        session: Any,
        interface: GraphInterface,
        size: int,
        length: int,
        prefill: Callable[[NDArray[np.int32]], F32],
        past: Callable[[int], Past],
        stopped: Callable[[int, Exception], Exception],
    ) -> None:
        self.size = size
        self._session, self._interface = session, interface
        self._prefill, self._past, self._stopped = prefill, past, stopped
        self._binding = session.io_binding()
        self._lengths: list[int] = []
        self._logits = np.zeros((size, 1, interface.vocabulary_size), interface.logits.dtype)
        kind = _Shared if interface.is_shared else _Growing
        self._cache: _RowCache = kind(interface.caches, size, length)
        self._range = np.array([0, 1], interface.range.dtype) if interface.range else None
        self._inputs: list[NDArray[Any]] = []  # kept while the library reads them

    def admit(self, prompt: NDArray[np.int32]) -> F32:
        """See Rows."""
        logits = self._prefill(prompt)
        self._cache.add(self._past(len(prompt)), self._lengths)
        self._lengths.append(len(prompt))
        return logits

    def step(self, tokens: Sequence[int]) -> F32:
        """See Rows."""
        interface, rows = self._interface, len(tokens)
        lengths = np.array(self._lengths)
        mask = self._cache.mask(lengths)
        given: list[tuple[ValueInfo | None, NDArray[Any] | None]] = [
            (interface.ids, np.array(tokens)[:, None]),
            (interface.mask, mask),
        ]
        given += [(interface.positions, lengths[:, None]), (interface.range, self._range)]
        self._inputs = []
        for port, values in given:
            if port is not None and values is not None:
                self._inputs.append(np.ascontiguousarray(values, port.dtype))
                bind_input(self._binding, port, values.shape, self._inputs[-1])
        bind_output(self._binding, interface.logits, (rows, 1, interface.vocabulary_size), self._logits)
        self._cache.bind(self._binding, rows, mask.shape[1])
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base but this
            raise self._stopped(mask.shape[1], error) from None
        self._cache.advance()
        self._lengths = [length + 1 for length in self._lengths]
        return self._logits[:rows, 0].astype(np.float32, copy=False)

    def drop(self, row: int) -> None:
        """See Rows."""
        self._cache.remove(row, self._lengths)
        self._lengths[row] = self._lengths[-1]
        self._lengths.pop()

    def close(self) -> None:
        """See Rows."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()


class PaddedScoring:
    """Short rows in one pass, each with padding behind it, which what comes before does not see."""

    def __init__(self, session: Any, interface: GraphInterface, outputs: int) -> None:
        self._session, self._interface, self._outputs = session, interface, outputs

    def groups(self, rows: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        """Rows of like lengths, of which the first and the last wanted token are in a bounded number of places."""
        if not self._interface.takes_rows:
            return [[row] for row in rows]
        return grouped(sorted(rows, key=lambda row: len(row.ids)), self._fits)

    def _fits(self, group: list[ScoreRequest]) -> bool:
        first, end = self._range(group)
        longest = max(len(row.ids) for row in group)
        padded = len(group) * longest
        outputs = len(group) * (end - first) if self._interface.range else padded
        return (
            len(group) <= MAX_SEQUENCES
            and padded <= min(_PADDED, _USEFUL * sum(len(row.ids) for row in group))
            and outputs <= min(self._outputs, _USEFUL * sum(len(row.wanted) for row in group))
        )

    def _range(self, group: Sequence[ScoreRequest]) -> tuple[int, int]:
        """Between which tokens there are logits: from the first one wanted of any row to behind the last."""
        return min(int(row.wanted[0]) for row in group), max(int(row.wanted[-1]) for row in group) + 1

    def scored(self, group: Sequence[ScoreRequest]) -> Iterator[tuple[int, F32]]:
        """The logits of a group."""
        interface = self._interface
        longest = max(len(row.ids) for row in group)
        shape = (len(group), longest)
        ids = np.zeros(shape, interface.ids.dtype)
        for place, row in enumerate(group):
            ids[place, : len(row.ids)] = row.ids
        first, end = self._range(group) if interface.range else (0, longest)
        logits = self._run(ids, first, end)
        for place, row in enumerate(group):
            own = row.wanted - first
            whole = len(own) == own[-1] - own[0] + 1
            yield row.number, logits[place, own[0] : own[-1] + 1] if whole else logits[place, own]

    def _run(self, ids: NDArray[Any], first: int, end: int) -> F32:
        interface, shape = self._interface, ids.shape
        given = {interface.ids.name: ids}
        if interface.mask:
            given[interface.mask.name] = np.ones(shape, interface.mask.dtype)
        if interface.positions:
            given[interface.positions.name] = np.tile(
                np.arange(shape[1], dtype=interface.positions.dtype), (shape[0], 1)
            )
        if interface.range:
            given[interface.range.name] = np.array([first, end], interface.range.dtype)
        for cache in interface.caches:
            past = shape[1] if interface.is_shared else 0
            given[cache.past.name] = np.zeros((shape[0], cache.heads, past, cache.head_size), cache.past.dtype)
        (logits,) = self._session.run([interface.logits.name], given)
        found: F32 = logits.astype(np.float32, copy=False)
        return found


class _RowCache(Protocol):
    """Keys and values of the rows; `lengths` are those of the rows before a change."""

    def add(self, past: Past, lengths: Sequence[int]) -> None:
        """One more row, behind the others."""

    def remove(self, row: int, lengths: Sequence[int]) -> None:
        """The last row takes the place of one."""

    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows, total] for a step: 1 where a row has a key, the new one included."""

    def bind(self, binding: Any, rows: int, total: int) -> None:
        """Before a step after which the longest row has `total` keys."""

    def advance(self) -> None:
        """After it."""


class _Shared:
    """Past and present in one buffer; each row begins at 0."""

    def __init__(self, caches: tuple[CacheTensor, ...], size: int, length: int) -> None:
        self._caches = caches
        shapes = [(size, cache.heads, length, cache.head_size) for cache in caches]
        self._buffers = [np.zeros(shape, cache.past.dtype) for shape, cache in zip(shapes, caches, strict=True)]
        self._bound = 0

    def add(self, past: Past, lengths: Sequence[int]) -> None:
        """See _RowCache."""
        for buffer, values in zip(self._buffers, past, strict=True):
            buffer[len(lengths), :, : values.shape[1]] = values

    def remove(self, row: int, lengths: Sequence[int]) -> None:
        """See _RowCache."""
        if row < len(lengths) - 1:
            for buffer in self._buffers:
                buffer[row, :, : lengths[-1]] = buffer[len(lengths) - 1, :, : lengths[-1]]

    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See _RowCache."""
        return (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64)

    def bind(self, binding: Any, rows: int, total: int) -> None:
        """See _RowCache."""
        if rows == self._bound:
            return
        for cache, buffer in zip(self._caches, self._buffers, strict=True):
            bind_input(binding, cache.past, (rows, *buffer.shape[1:]), buffer)
            bind_output(binding, cache.present, (rows, *buffer.shape[1:]), buffer)
        self._bound = rows

    def advance(self) -> None:
        """See _RowCache."""


class _Growing:
    """Two buffers that change roles; the rows end at the same place, the shorter ones with zeros before them."""

    def __init__(self, caches: tuple[CacheTensor, ...], size: int, length: int) -> None:
        self._caches = caches
        sizes = [size * cache.heads * length * cache.head_size for cache in caches]
        self._pasts, self._presents = (
            [np.zeros(count, cache.past.dtype) for count, cache in zip(sizes, caches, strict=True)] for _ in range(2)
        )
        self._total = 0

    def add(self, past: Past, lengths: Sequence[int]) -> None:
        """See _RowCache."""
        self._arrange([*range(len(lengths)), -1], [*lengths, past[0].shape[1]], len(lengths), past)

    def remove(self, row: int, lengths: Sequence[int]) -> None:
        """See _RowCache."""
        rows = list(range(len(lengths)))
        rows[row] = rows[-1]
        self._arrange(rows[:-1], [lengths[which] for which in rows[:-1]], len(lengths))

    def _arrange(self, rows: Sequence[int], lengths: Sequence[int], before: int, past: Past | None = None) -> None:
        """Lay out anew: of the `before` rows those numbered `rows`, -1 being `past`."""
        old_total, self._total = self._total, max(lengths, default=0)
        for number, cache in enumerate(self._caches):
            old = _seen(self._pasts[number], cache, before, old_total)
            new = _seen(self._presents[number], cache, len(rows), self._total)
            for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                new[place, :, : self._total - length] = 0
                kept = past[number] if past is not None and row < 0 else old[row, :, old_total - length :]
                new[place, :, self._total - length :] = kept
        self.advance()

    def mask(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See _RowCache."""
        return (np.arange(self._total + 1) >= self._total - lengths[:, None]).astype(np.int64)

    def bind(self, binding: Any, rows: int, total: int) -> None:
        """See _RowCache."""
        for cache, past, present in zip(self._caches, self._pasts, self._presents, strict=True):
            bind_input(binding, cache.past, (rows, cache.heads, total - 1, cache.head_size), past)
            bind_output(binding, cache.present, (rows, cache.heads, total, cache.head_size), present)
        self._total = total

    def advance(self) -> None:
        """See _RowCache."""
        self._pasts, self._presents = self._presents, self._pasts


def _seen(buffer: NDArray[Any], cache: CacheTensor, rows: int, total: int) -> NDArray[Any]:
    return buffer[: rows * cache.heads * total * cache.head_size].reshape(rows, cache.heads, total, cache.head_size)
