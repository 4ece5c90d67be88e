"""One forward pass after another through a graph, with every buffer bound once.

ONNX Runtime's IoBinding is given our own memory: ids, mask, positions, logits, and the key-value cache. With
GroupQueryAttention past and present are the same buffer and a token is appended in place; a graph of standard operators
writes a longer present each time, for which there are two buffers that change roles. Nothing is copied by us.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.interrupts import terminating
from edgetune.runtime.onnx.graph_interface import CacheTensor, GraphInterface, ValueInfo
from edgetune.runtime.onnx.session import library


class Decoder:
    """A session with its buffers for a context of `context` tokens; at most `batch` tokens and `rows` logits a call."""

    def __init__(self, session: Any, interface: GraphInterface, context: int, batch: int, rows: int) -> None:
        self._session, self._interface = session, interface
        self._binding = session.io_binding()
        self._options = library().RunOptions()
        self._ids = np.zeros(batch, interface.ids.dtype)
        self._mask = np.ones(context, interface.mask.dtype) if interface.mask else None
        self._positions = np.arange(context, dtype=interface.positions.dtype) if interface.positions else None
        self._range = np.zeros(2, interface.range.dtype) if interface.range else None
        self._logits = np.zeros((rows, interface.vocabulary_size), interface.logits.dtype)
        self._bound: tuple[int, int] | None = None
        self._given: dict[str, NDArray[Any]] = {}
        kind = _SharedCache if interface.is_shared else _GrowingCache
        self._cache: _KeyValues = kind(self._binding, interface.caches, context)
        if interface.range and self._range is not None:
            bind_input(self._binding, interface.range, (2,), self._range)

    def give(self, name: str, values: NDArray[Any]) -> None:
        """Bind one more input to a buffer, whose contents may be changed between calls."""
        self._given[name] = values
        self._binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)

    def step(self, token: int, position: int) -> NDArray[np.float32]:
        """Logits [V] after one token at `position`; a view."""
        self._ids[0] = token
        self._bind(position, 1, 0, 1)
        self._session.run_with_iobinding(self._binding)
        self._cache.advance()
        logits: NDArray[np.float32] = self._as_floats(1)[0]
        return logits

    def evaluate(self, ids: NDArray[np.int32], start: int, first: int, end: int) -> NDArray[np.float32]:
        """Logits [end - first, V] after ids[first:end], which stand at positions start + first and on; a view.

        A signal ends the call; where none of its handlers raises, it is done again.
        """
        count = len(ids)
        self._ids[:count] = ids
        rows = self._bind(start, count, first, end)
        while True:
            self._options.terminate = False
            try:
                with terminating(self._options):
                    self._session.run_with_iobinding(self._binding, self._options)
                break
            except Exception:
                if not self._options.terminate:
                    raise
        self._cache.advance()
        logits = self._as_floats(rows)
        return logits if rows == end - first else logits[first:end]

    def past(self, length: int) -> list[NDArray[Any]]:
        """Keys and values of the first `length` positions, of each cache [heads, length, head_size]; views."""
        return self._cache.past(length)

    def _bind(self, start: int, count: int, first: int, end: int) -> int:
        """Tell the binding what has changed; how many rows of logits there will be."""
        interface, total = self._interface, start + count
        rows = count
        if self._range is not None:
            self._range[:] = first, end
            rows = end - first
        if self._bound != (count, rows):
            bind_input(self._binding, interface.ids, (1, count), self._ids)
            bind_output(self._binding, interface.logits, (1, rows, interface.vocabulary_size), self._logits)
            self._bound = count, rows
        if self._mask is not None and interface.mask:
            bind_input(self._binding, interface.mask, (1, total), self._mask)
        if self._positions is not None and interface.positions:
            bind_input(self._binding, interface.positions, (1, count), self._positions[start:])
        self._cache.bind(start, total)
        return rows

    def _as_floats(self, rows: int) -> NDArray[np.float32]:
        return self._logits[:rows].astype(np.float32, copy=False)


class _KeyValues(Protocol):
    def bind(self, start: int, total: int) -> None:
        """Before a call on tokens start..total."""

    def advance(self) -> None:
        """After it."""

    def past(self, length: int) -> list[NDArray[Any]]:
        """See Decoder."""


class _SharedCache:
    """Past and present in one buffer, bound once for all calls."""

    def __init__(self, binding: Any, caches: tuple[CacheTensor, ...], context: int) -> None:
        self._buffers = []
        for cache in caches:
            shape = (1, cache.heads, context, cache.head_size)
            buffer = np.zeros(shape, cache.past.dtype)  # memory is taken only as it is written
            self._buffers.append(buffer)
            bind_input(binding, cache.past, shape, buffer)
            bind_output(binding, cache.present, shape, buffer)

    def bind(self, start: int, total: int) -> None:
        """Nothing changes."""

    def advance(self) -> None:
        """Nothing changes."""

    def past(self, length: int) -> list[NDArray[Any]]:
        """See Decoder."""
        return [buffer[0, :, :length] for buffer in self._buffers]


class _GrowingCache:
    """Two buffers for each key and value: a call reads the past in one and writes the present into the other."""

    def __init__(self, binding: Any, caches: tuple[CacheTensor, ...], context: int) -> None:
        self._binding, self._caches = binding, caches
        self._pasts, self._presents = (
            [np.zeros(cache.heads * context * cache.head_size, cache.past.dtype) for cache in caches] for _ in range(2)
        )

    def bind(self, start: int, total: int) -> None:
        """The lengths, and which buffer is which."""
        for cache, past, present in zip(self._caches, self._pasts, self._presents, strict=True):
            bind_input(self._binding, cache.past, (1, cache.heads, start, cache.head_size), past)
            bind_output(self._binding, cache.present, (1, cache.heads, total, cache.head_size), present)

    def advance(self) -> None:
        """What was written is the past of the next call."""
        self._pasts, self._presents = self._presents, self._pasts

    def past(self, length: int) -> list[NDArray[Any]]:
        """See Decoder; just after a call that ended there."""
        shapes = [(cache.heads, length, cache.head_size) for cache in self._caches]
        return [past[: math.prod(shape)].reshape(shape) for past, shape in zip(self._pasts, shapes, strict=True)]


def bind_input(binding: Any, port: ValueInfo, shape: tuple[int, ...], buffer: NDArray[Any]) -> None:
    """Let an input be read from the beginning of a buffer, which is to be kept."""
    binding.bind_input(port.name, "cpu", 0, port.dtype, shape, buffer.ctypes.data)


def bind_output(binding: Any, port: ValueInfo, shape: tuple[int, ...], buffer: NDArray[Any]) -> None:
    """Let an output be written to the beginning of a buffer, which is to be kept."""
    binding.bind_output(port.name, "cpu", 0, port.dtype, shape, buffer.ctypes.data)
