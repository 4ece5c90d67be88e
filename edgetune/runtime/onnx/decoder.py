"""Forward passes of one sequence through a graph, with all buffers bound by IoBinding and nothing copied.

With GroupQueryAttention, past and present are the same buffer and a token is appended in place. A graph of standard
operators writes a longer present in each pass, into the other one of two buffers that swap roles.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.runtime.interrupts import terminate_on_signal
from edgetune.runtime.onnx.graph_interface import CacheTensor, GraphInterface, ValueInfo
from edgetune.runtime.onnx.session import library


class Decoder:
    """A session with its buffers for a context of `context` tokens; at most `batch` tokens and `rows` logits a call.

    Positions are those of a text: the prefix, if there is one, comes before position 0 and counts in `context`.
    """

    def __init__(
        self, session: Any, interface: GraphInterface, context: int, batch: int, rows: int, vocabulary_size: int
    ) -> None:
        """Allocate the buffers; of each row of logits, `vocabulary_size` are returned."""
        self.width = vocabulary_size
        """How many logits of each row are returned."""
        self._prefix: list[NDArray[Any]] = []
        self._offset = 0
        self._session, self._interface = session, interface
        self._binding = session.io_binding()
        self._options = library().RunOptions()
        self._ids = np.zeros(batch, interface.ids.dtype)
        self._mask = np.ones(context, interface.mask.dtype) if interface.mask else None
        self._positions = np.arange(context, dtype=interface.positions.dtype) if interface.positions else None
        self._range = np.zeros(2, interface.range.dtype) if interface.range else None
        self._logits = np.zeros((rows, interface.vocabulary_size), interface.logits.dtype)
        self._bound: tuple[int, int] | None = None
        self._extra: dict[str, NDArray[Any]] = {}  # kept alive while they are bound
        cache = _SharedCache if interface.is_shared else _GrowingCache
        self._cache: _Cache = cache(self._binding, interface.caches, context)
        if interface.range and self._range is not None:
            bind_input(self._binding, interface.range, (2,), self._range)
        self.score = np.zeros((1, 1), np.float32)
        """The score at the last token of the last call, of a reward model."""
        if interface.score:
            bind_output(self._binding, interface.score, (1, 1), self.score)

    def set_prefix(self, prefix: list[NDArray[Any]]) -> None:
        """Put keys and values [heads, length, head_size] of each cache tensor before every text from now on."""
        self._prefix, self._offset = [np.array(values) for values in prefix], prefix[0].shape[1]

    def bind_extra(self, name: str, buffer: NDArray[Any]) -> None:
        """Bind an input that is not part of the interface to a buffer, whose contents may change between calls."""
        self._extra[name] = buffer
        self._binding.bind_input(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)

    def step(self, token: int, position: int) -> NDArray[np.float32]:
        """Evaluate one token at `position`; return the logits [V] after it, a view. The hot path of generation."""
        self._ids[0] = token
        self._bind(position, 1, 0, 1)
        self._session.run_with_iobinding(self._binding)
        self._cache.advance()
        logits: NDArray[np.float32] = self._as_floats(1)[0]
        return logits

    def evaluate(self, ids: NDArray[np.int32], start: int, first: int, end: int) -> NDArray[np.float32]:
        """Evaluate `ids` from position `start`; return the logits [end - first, V] after ids[first:end], a view.

        A signal ends the call. If no signal handler raises, the call is repeated.
        """
        count = len(ids)
        self._ids[:count] = ids
        rows = self._bind(start, count, first, end)
        while True:
            self._options.terminate = False
            try:
                with terminate_on_signal(self._options):
                    self._session.run_with_iobinding(self._binding, self._options)
                break
            except Exception:
                if not self._options.terminate:
                    raise
        self._cache.advance()
        logits = self._as_floats(rows)
        return logits if rows == end - first else logits[first:end]

    def restore(self, past: list[NDArray[Any]]) -> None:
        """Begin with keys and values [heads, n, head_size] of prefix and tokens, behind which `evaluate` goes on."""
        self._cache.restore(past)

    def past(self, length: int) -> list[NDArray[Any]]:
        """Return the keys and values [heads, n, head_size] of prefix and `length` tokens, as views.

        With two buffers, only directly after a call that ended at `length`.
        """
        return self._cache.past(self._offset + length)

    def _bind(self, start: int, count: int, first: int, end: int) -> int:
        """Bind what has changed since the last call; return the number of rows of logits."""
        if start == 0 and self._prefix:
            self._cache.restore(self._prefix)
        start += self._offset
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
        logits = self._logits[:rows].astype(np.float32, copy=False)
        return visible(logits, self.width)


def visible(logits: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the first `size` logits of each row [n, V], contiguous; the array itself where that is all of them."""
    return logits if logits.shape[-1] == size else np.ascontiguousarray(logits[..., :size])


class _Cache(ABC):
    """Keys and values of one sequence."""

    @abstractmethod
    def bind(self, start: int, total: int) -> None:
        """Bind the buffers for a call on the tokens start..total."""

    @abstractmethod
    def advance(self) -> None:
        """Note that a call has been done."""

    @abstractmethod
    def restore(self, prefix: list[NDArray[Any]]) -> None:
        """Begin with these keys and values [heads, length, head_size]."""

    @abstractmethod
    def past(self, length: int) -> list[NDArray[Any]]:
        """Return the first `length` keys and values of each cache tensor; see `Decoder.past`."""


class _SharedCache(_Cache):
    """Past and present in one buffer, bound once for all calls."""

    def __init__(self, binding: Any, caches: tuple[CacheTensor, ...], context: int) -> None:
        self._buffers = []
        for cache in caches:
            shape = (1, cache.heads, context, cache.head_size)
            buffer = np.zeros(shape, cache.past.dtype)  # the system allocates a page when it is first written
            self._buffers.append(buffer)
            bind_input(binding, cache.past, shape, buffer)
            bind_output(binding, cache.present, shape, buffer)

    @override
    def bind(self, start: int, total: int) -> None:
        pass

    @override
    def advance(self) -> None:
        pass

    @override
    def restore(self, prefix: list[NDArray[Any]]) -> None:
        for buffer, values in zip(self._buffers, prefix, strict=True):
            buffer[0, :, : values.shape[1]] = values

    @override
    def past(self, length: int) -> list[NDArray[Any]]:
        return [buffer[0, :, :length] for buffer in self._buffers]


class _GrowingCache(_Cache):
    """Two buffers for each cache tensor: a call reads the past in one and writes the present into the other."""

    def __init__(self, binding: Any, caches: tuple[CacheTensor, ...], context: int) -> None:
        self._binding, self._caches = binding, caches
        self._pasts, self._presents = (
            [np.zeros(cache.heads * context * cache.head_size, cache.past.dtype) for cache in caches] for _ in range(2)
        )

    @override
    def bind(self, start: int, total: int) -> None:
        for cache, past, present in zip(self._caches, self._pasts, self._presents, strict=True):
            bind_input(self._binding, cache.past, (1, cache.heads, start, cache.head_size), past)
            bind_output(self._binding, cache.present, (1, cache.heads, total, cache.head_size), present)

    @override
    def advance(self) -> None:
        self._pasts, self._presents = self._presents, self._pasts

    @override
    def restore(self, prefix: list[NDArray[Any]]) -> None:
        for past, values in zip(self._pasts, prefix, strict=True):
            past[: values.size] = values.ravel()

    @override
    def past(self, length: int) -> list[NDArray[Any]]:
        shapes = [(cache.heads, length, cache.head_size) for cache in self._caches]
        return [past[: math.prod(shape)].reshape(shape) for past, shape in zip(self._pasts, shapes, strict=True)]


def bind_input(binding: Any, value: ValueInfo, shape: tuple[int, ...], buffer: NDArray[Any]) -> None:
    """Bind an input to the beginning of a buffer. The caller keeps the buffer alive."""
    binding.bind_input(value.name, "cpu", 0, value.dtype, shape, buffer.ctypes.data)


def bind_output(binding: Any, value: ValueInfo, shape: tuple[int, ...], buffer: NDArray[Any]) -> None:
    """Bind an output to the beginning of a buffer. The caller keeps the buffer alive."""
    binding.bind_output(value.name, "cpu", 0, value.dtype, shape, buffer.ctypes.data)
