"""What stands in llama.cpp's cache before every text."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama.context import BATCH, LlamaContext
from edgetune.runtime.prefix_state import PrefixState


class EvaluatedPrefix:
    """Soft tokens of the vocabulary, evaluated before each text."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self._ids = ids
        self.length = len(ids)

    def put(self, context: LlamaContext, sequence: int) -> None:
        """Evaluate the tokens at the positions 0 to `length` - 1."""
        for start in range(0, self.length, BATCH):
            piece = self._ids[start : start + BATCH]
            context.decode_at(piece, start, np.zeros(len(piece), np.int8), sequence)


class StoredPrefix:
    """Keys and values of every layer, put into the cache as a saved state of llama.cpp.

    The state is one that llama.cpp saved of as many tokens, in which the keys and values are replaced: so its header is
    that of the library in use. A layout that cannot be followed to its last byte is refused.
    """

    def __init__(self, state: PrefixState, path: Path) -> None:
        self._state, self._path = state, path
        self.length = state.length
        # of each context and sequence: the header of a state states the place of its sequence
        self._saved: WeakKeyDictionary[LlamaContext, dict[int, bytes]] = WeakKeyDictionary()

    def put(self, context: LlamaContext, sequence: int) -> None:
        """Load the keys and values at the positions 0 to `length` - 1."""
        saved = self._saved.setdefault(context, {})
        if sequence not in saved:
            for start in range(0, self.length, BATCH):
                count = min(BATCH, self.length - start)
                context.decode_at(np.zeros(count, np.int32), start, np.zeros(count, np.int8), sequence)
            own = context.saved_state(sequence)
            saved[sequence] = with_cache(own, self._state, self._path)
            context.clear_cache(sequence)
        context.load_state(saved[sequence], sequence)


_TYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # ggml_type -> type of a cache


def with_cache(saved: bytes, state: PrefixState, path: Path) -> bytes:
    """Return a saved state of llama.cpp with other keys and values.

    Its end is: whether values are transposed (u32), the number of layers (u32), then for the keys of each layer the
    type (i32), the bytes of a row (u64) and a row for each token; and for the values the same, or transposed, the type
    (i32), the bytes of an element (u32), the elements of a row (u32) and a row for each element. Source: llama.cpp,
    src/llama-kv-cache.cpp, state_write_data.

    Raises:
        RuntimeProblem: The layout is another one, or the sizes are not those of the prefix.
    """
    layers = len(state.keys)
    for start in range(0, len(saved) - 8, 4):
        transposed, count = np.frombuffer(saved, "<u4", 2, start).tolist()
        if transposed in (0, 1) and count == layers:
            found = _replaced(saved, start + 8, state, is_transposed=bool(transposed))
            if found is not None:
                return saved[: start + 8] + found
    raise RuntimeProblem(
        f"llama.cpp keeps the keys and values of {path} in a way that a prefix cannot be written to (windows of "
        "attention, or another version of the library)",
        "Export the model to ONNX: --format onnx",
    )


def _replaced(saved: bytes, at: int, state: PrefixState, *, is_transposed: bool) -> bytes | None:
    """The rest of a state from the first layer on; None if its layout is not that of the prefix."""
    pieces: list[bytes] = []
    for number, arrays in enumerate((state.keys, state.values)):
        for array in arrays:
            rows = np.ascontiguousarray(array.transpose(1, 0, 2)).reshape(state.length, -1)
            flipped = is_transposed and number == 1
            header = 12
            if at + header > len(saved):
                return None
            dtype = _TYPES.get(int(np.frombuffer(saved, "<i4", 1, at)[0]))
            if dtype is None:
                return None
            if flipped:
                sizes = np.frombuffer(saved, "<u4", 2, at + 4).tolist()
                fits = sizes == [dtype.itemsize, rows.shape[1]]
            else:
                fits = int(np.frombuffer(saved, "<u8", 1, at + 4)[0]) == rows.shape[1] * dtype.itemsize
            if not fits:
                return None
            content = np.ascontiguousarray(rows.T if flipped else rows).astype(dtype).tobytes()
            pieces += [saved[at : at + header], content]
            at += header + len(content)
    rest = saved[at:]  # for each further sequence of the context, that it has no tokens here
    return b"".join([*pieces, rest]) if len(rest) % 4 == 0 and not any(rest) else None
