"""The stream of merged tensors: base plus adapter, in blocks of rows; one block is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.products import product
from edgetune_converters.architectures import BoundTensor, Family, Head, ModelConfig, Piece, slots
from edgetune_converters.architectures.operations import RopePermute
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, TensorInfo, widened

BLOCK_BYTES = 4 * 1024 * 1024

# dtype of stored rows -> mask of its exponent
_EXPONENTS = {np.dtype(np.uint16): np.uint16(0x7F80), np.dtype(np.float16): np.uint16(0x7C00)}

# makes the reader of a source that is not read as it is stored (merge_base.py)
Reader = Callable[[Checkpoint, TensorInfo], Read]


@dataclass(frozen=True)
class RowBlock:
    """Rows of a merged tensor, [n, k], from row `first` on.

    Rows are f32, or unchanged in the base's type (f16, or the bits of bf16 in uint16). `delta` computes the part that
    the adapter added; call `release` when the rows are no longer needed.
    """

    rows: NDArray[Any]
    first: int = 0
    delta: Callable[[], F32] | None = None
    release: Callable[[], None] = lambda: None

    @property
    def floats(self) -> F32:
        """The rows in f32."""
        return widened(self.rows)


# makes a block; the argument is the number of threads (0: one per core)
MakeBlock = Callable[[int], RowBlock]


@dataclass(frozen=True)
class TensorPart:
    """A piece of a tensor with the adapter's change of its source, and a reader where it is not read as stored.

    `trained` reads the source as it was in training, where that is not what the change is merged into.
    """

    piece: Piece
    change: Change | None = None
    reader: Reader | None = None
    trained: Reader | None = None

    @property
    def in_hf_row_order(self) -> TensorPart:
        """The same part without the row permutation that only llama.cpp needs."""
        view = self.piece.view
        steps = tuple(step for step in view.steps if not isinstance(step, RopePermute))
        return replace(self, piece=replace(self.piece, view=replace(view, steps=steps)))

    def pieces(self, checkpoint: Checkpoint, limit: int) -> Iterator[MakeBlock]:
        """Yield the tasks that make the blocks of its rows, in order; base and delta have the same view."""
        count, width = self.piece.shape
        # a vector is read at once: it is one row in the file
        step = count if width == 1 else max(1, limit // (4 * width))
        source = _Source(self, checkpoint)
        for first in range(0, count, step):
            yield partial(source.block, slice(first, min(first + step, count)))


class _Source:
    """Makes the blocks of a part; the factors of its change are read once for all blocks."""

    def __init__(self, part: TensorPart, checkpoint: Checkpoint) -> None:
        self._piece = part.piece
        change = part.change
        self._factors = change.factors() if change and change.factors else None
        self._forget: Callable[[RowIndex], None] = lambda rows: None
        if change and change.replacement:
            self._read: Read = partial(change.file.stored, change.replacement)
            self._forget = partial(change.file.forget, change.replacement)
        elif part.reader:
            self._read = part.reader(checkpoint, part.piece.source)
        else:
            self._read = partial(checkpoint.stored, part.piece.source)
            self._forget = partial(checkpoint.forget, part.piece.source)
        if change and change.token_rows:
            self._read = change.token_rows.over(self._read)
        replaced = change.replacement if change else None
        self._changed: Read | None = None
        if change and change.transform:
            trained = part.trained(checkpoint, part.piece.source) if part.trained else self._read
            self._changed = change.transform.apply(self._read, trained)
        # the tensor of which the numbers are, for the message
        self._name = replaced.name if replaced else self._piece.source.name
        self._damaged = "adapter" if replaced else "base model"

    def block(self, rows: slice, threads: int) -> RowBlock:
        view = self._piece.view
        base = view.read(self._read, self._piece.columns, rows.start, rows.stop)
        if self._changed is not None:
            return self._transformed(self._changed, base, rows)
        if self._factors is None:
            self._check(base)
            return RowBlock(view.finalize(base), rows.start, release=partial(self._release, rows))
        merged = view.finalize(self._merged(base, rows, threads))
        self._release(rows)
        return RowBlock(merged, rows.start, partial(self._delta, rows))

    def _transformed(self, changed: Read, base: NDArray[Any], rows: slice) -> RowBlock:
        """Return the block of a change that is a transform."""
        view = self._piece.view
        self._check(base)
        read = view.read(changed, self._piece.columns, rows.start, rows.stop)
        merged = np.ascontiguousarray(read, dtype=np.float32)
        check_finite(f"{self._name}, with the change of the adapter,", merged, damaged="adapter")
        self._release(rows)
        delta = merged - widened(base)  # before `finalize`, which may change the rows in place
        return RowBlock(view.finalize(merged), rows.start, lambda: delta)

    def _check(self, rows: NDArray[Any]) -> None:
        check_finite(self._name, rows, self._bad_in_all, damaged=self._damaged)

    def _bad_in_all(self) -> int:
        """The number of NaN or infinite weights in the whole tensor, for the message."""
        count = math.prod(self._piece.source.shape) // max(1, self._piece.columns)
        blocks = (slice(first, min(first + 4096, count)) for first in range(0, count, 4096))
        return sum(count_bad(self._read(block, ALL)) for block in blocks)

    def _release(self, rows: slice) -> None:
        if self._piece.view.copies:
            self._forget(rows)

    def _merged(self, base: NDArray[Any], rows: slice, threads: int) -> F32:
        assert self._factors is not None
        left, right = self._factors
        if self._piece.view.transpose or left.ndim > 2:
            merged: F32 = widened(base) + self._delta(rows)
            self._check(merged)
            return merged
        own = np.ascontiguousarray(left[self._piece.view.source(rows.start, rows.stop)])
        try:
            merged = edgetune_native.add_product(np.ascontiguousarray(base), own, right, threads=threads)
        except ValueError:
            self._check(widened(base) + own @ right)
            raise
        return merged

    def _delta(self, rows: slice) -> F32:
        assert self._factors is not None
        delta: F32 = self._piece.view.read(partial(product, *self._factors), self._piece.columns, rows.start, rows.stop)
        return delta


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: `shape` in NumPy order, `dtype` that of the base."""

    slot: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[TensorPart, ...] = ()
    values: F32 | None = None

    @property
    def gguf_name(self) -> str:
        """The name in a GGUF file."""
        return slots.gguf_name(self.slot, self.layer, self.part)

    @property
    def in_hf_row_order(self) -> MergedTensor:
        """The same tensor with rotated heads in the base's row order; itself where that is no change."""
        if not any(isinstance(step, RopePermute) for part in self.parts for step in part.piece.view.steps):
            return self
        return replace(self, parts=tuple(part.in_hf_row_order for part in self.parts))

    @property
    def sources(self) -> set[str]:
        """The names of the base tensors from which it is made."""
        return {part.piece.source.name for part in self.parts}

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        read = 0
        for part in self.parts:
            source = part.piece.source
            read += source.bytes * math.prod(part.piece.shape) // math.prod(source.shape)
        return read

    def pieces(self, checkpoint: Checkpoint, limit: int = BLOCK_BYTES) -> Iterator[MakeBlock]:
        """Yield the tasks that make its blocks, in order, of at most `limit` bytes of f32 (at least one row).

        Tasks may run on several threads. A task raises CheckpointError for NaN or infinity.
        """
        if self.values is not None:
            values = self.values.reshape(1, -1)
            yield lambda threads: RowBlock(values)
        before = 0
        for part in self.parts:
            for make in part.pieces(checkpoint, limit):
                yield partial(self._block, make, before)
            before += part.piece.shape[0]

    def blocks(self, checkpoint: Checkpoint, limit: int = BLOCK_BYTES) -> Iterator[RowBlock]:
        """Make the blocks one after the other."""
        return (make(0) for make in self.pieces(checkpoint, limit))

    def _block(self, make: MakeBlock, before: int, threads: int) -> RowBlock:
        """Reshape to rows of the file: a vector was read as a column, but is one row or several."""
        block = make(threads)
        rows = block.rows.reshape(1, -1) if len(self.shape) == 1 else block.rows.reshape(-1, self.shape[-1])
        return replace(block, rows=rows, first=before + block.first)


def merged_tensors(
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    bound: Sequence[BoundTensor],
    changes: Mapping[str, Change],
) -> list[MergedTensor]:
    """Return all tensors of the merged model in the order of the file.

    A head that equals the embedding, after the merge too, is omitted where readers then use the embedding.
    """
    tensors = [_merged(item, changes) for item in bound if not _left_out(family, item, bound, checkpoint, changes)]
    for row in family.generated:
        values = row.compute(config)
        if values is not None:
            tensors.append(MergedTensor(row.slot, None, "weight", values.shape, "F32", values=values))
    for slot, values in checkpoint.carried:
        tensors.append(MergedTensor(slot, None, "weight", values.shape, "F32", values=values))
    return sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.gguf_name))


def _merged(item: BoundTensor, changes: Mapping[str, Change]) -> MergedTensor:
    parts = tuple(TensorPart(piece, change_of(piece, changes)) for piece in item.pieces)
    return MergedTensor(item.slot, item.layer, item.part, item.shape, item.pieces[0].source.dtype, parts)


def change_of(piece: Piece, changes: Mapping[str, Change]) -> Change | None:
    """Return the adapter's change of a piece, under its own name or as a part of all experts."""
    own, slab = changes.get(piece.target), piece.part_of
    whole = None if slab is None else changes.get(slab.target)
    if slab is None or whole is None:
        return own
    if own is not None:
        raise AdapterError(f"the adapter changes {slab.target} as a whole, and {piece.target} as a part of it")
    return whole.of_expert(slab.number, slab.first, piece.source.shape[0], transposed=slab.transposed)


def _left_out(
    family: Family,
    item: BoundTensor,
    bound: Sequence[BoundTensor],
    checkpoint: Checkpoint,
    changes: Mapping[str, Change],
) -> bool:
    """Whether `item` is a head that need not be written."""
    if (item.slot, item.part) != (slots.OUTPUT, "weight") or family.head is Head.ALWAYS:
        return False
    return _tied(item, bound, checkpoint, changes)


def _tied(
    item: BoundTensor, bound: Sequence[BoundTensor], checkpoint: Checkpoint, changes: Mapping[str, Change]
) -> bool:
    """Whether a head equals the embedding, after the merge."""
    embedding = next(other for other in bound if other.slot == slots.EMBEDDING)
    (one,), (other,) = item.pieces, embedding.pieces
    changed = [piece.target in changes for piece in (one, other)]
    if all(changed):
        return _same_numbers(_merged(item, changes), _merged(embedding, changes), checkpoint)
    same_source = one.source.name == other.source.name
    return not any(changed) and (same_source or checkpoint.equal(one.source.name, other.source.name))


def _same_numbers(one: MergedTensor, other: MergedTensor, checkpoint: Checkpoint) -> bool:
    pairs = zip(one.blocks(checkpoint), other.blocks(checkpoint), strict=True)
    return one.shape == other.shape and all(np.array_equal(a.floats, b.floats) for a, b in pairs)


def check_finite(
    name: str, rows: NDArray[Any], in_all: Callable[[], int] = int, *, damaged: str = "base model"
) -> None:
    """Raise CheckpointError with the number of NaN or infinite weights; `in_all` counts in the whole tensor."""
    if _looks_finite(rows):
        return
    bad = count_bad(rows)
    if bad:
        bad = max(bad, in_all())
        raise CheckpointError(f"{name} holds {bad} weights that are NaN or infinite", f"The {damaged} is damaged")


def count_bad(rows: NDArray[Any]) -> int:
    """Return the number of NaN or infinite weights."""
    return int(np.count_nonzero(~np.isfinite(widened(rows))))


def _looks_finite(rows: NDArray[Any]) -> bool:
    """Check cheaply: 16-bit types by an exponent of ones; f32 by its sum, which may also overflow."""
    if rows.dtype != np.float32:
        ones = _EXPONENTS[rows.dtype]
        return bool(np.bitwise_and(rows.view(np.uint16), ones).max(initial=0) != ones)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(rows.sum()))
