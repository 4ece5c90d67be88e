"""The stream of merged tensors: base plus adapter in blocks of rows, one block alive at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgetune_converters.adapters import Change
from edgetune_converters.architectures import Bound, Family, Head, ModelConfig, Piece, slots
from edgetune_converters.architectures.operations import Read
from edgetune_converters.checkpoint import F32, Checkpoint, Rows, TensorInfo
from edgetune_converters.errors import AdapterError, ArchitectureError, CheckpointError

BLOCK_BYTES = 8 * 1024 * 1024

# makes, for one source, what reads it other than as it is stored (merge_base.py)
Reader = Callable[[Checkpoint, TensorInfo], Read]


@dataclass(frozen=True)
class Block:
    """Rows of a merged tensor, f32 [n, k]; `delta` is the part that the adapter added, None without one."""

    rows: F32
    delta: F32 | None = None


@dataclass(frozen=True)
class Part:
    """A piece of a tensor with what the adapter does to its source, and how that is read where not as it is stored."""

    piece: Piece
    change: Change | None = None
    reader: Reader | None = None

    def blocks(self, checkpoint: Checkpoint, limit: int) -> Iterator[Block]:
        """The rows of the piece in order; base and delta are seen through the same view."""
        view, (count, width) = self.piece.view, self.piece.shape
        factors = self.change.factors() if self.change and self.change.factors else None
        # a vector is read at once: it is one row of the file
        step = count if width == 1 else max(1, limit // (4 * width))
        read = self._base(checkpoint)
        for first in range(0, count, step):
            last = min(first + step, count)
            base = view.read(read, self.piece.columns, first, last)
            delta = None
            if factors is not None:
                delta = view.read(partial(_product, *factors), self.piece.columns, first, last)
                base += delta
            check_finite(self.piece.source.name, base)
            yield Block(view.finished(base), delta)

    def _base(self, checkpoint: Checkpoint) -> Read:
        """What gives rows and columns of the source before the delta."""
        if self.change and (replacement := self.change.replacement):
            return partial(self.change.file.rows, replacement)
        source = self.piece.source
        return partial(checkpoint.rows, source) if self.reader is None else self.reader(checkpoint, source)


def _product(left: F32, right: F32, rows: Rows, columns: Rows) -> F32:
    """Rows and columns of left @ right; for a stack of experts the rows of all are counted through."""
    if left.ndim == 2:
        product: F32 = left[rows] @ right[:, columns]
        return product
    numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    expert, inside = np.divmod(numbers, left.shape[1])
    found = [left[one][inside[expert == one]] @ right[one][:, columns] for one in np.unique(expert)]
    return np.concatenate(found)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: `shape` as numpy says it, `dtype` as the base stored it."""

    slot: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...] = ()
    values: F32 | None = None

    @property
    def gguf_name(self) -> str:
        """Its name in a GGUF file."""
        return slots.gguf_name(self.slot, self.layer, self.part)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for it."""
        read = 0
        for part in self.parts:
            source = part.piece.source
            read += source.bytes * math.prod(part.piece.shape) // math.prod(source.shape)
        return read

    def blocks(self, checkpoint: Checkpoint, limit: int = BLOCK_BYTES) -> Iterator[Block]:
        """The rows in order, at most `limit` bytes of f32 at a time (at least one row).

        Errors: CheckpointError when a weight is NaN or infinite.
        """
        if self.values is not None:
            yield Block(self.values.reshape(1, -1))
        for part in self.parts:
            for block in part.blocks(checkpoint, limit):
                delta = None if block.delta is None else self._as_rows(block.delta)
                yield Block(self._as_rows(block.rows), delta)

    def _as_rows(self, values: F32) -> F32:
        """Rows of the file: a vector was read as a column, but is a row or several of them."""
        return values.reshape(1, -1) if len(self.shape) == 1 else values.reshape(-1, self.shape[-1])


def merged_tensors(
    family: Family, config: ModelConfig, checkpoint: Checkpoint, bound: Sequence[Bound], changes: Mapping[str, Change]
) -> list[MergedTensor]:
    """All tensors of the merged model in the order in which they are written.

    A head that is, and stays, equal to the embedding is left out where readers then use the embedding.
    Errors: ArchitectureError when the head differs and the family's readers know only the embedding.
    """
    tensors = [_merged(item, changes) for item in bound if not _left_out(family, item, bound, checkpoint, changes)]
    for row in family.generated:
        values = row.compute(config)
        if values is not None:
            tensors.append(MergedTensor(row.slot, None, "weight", values.shape, "F32", values=values))
    for slot, values in checkpoint.carried:
        tensors.append(MergedTensor(slot, None, "weight", values.shape, "F32", values=values))
    return sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.gguf_name))


def _merged(item: Bound, changes: Mapping[str, Change]) -> MergedTensor:
    parts = tuple(Part(piece, change_of(piece, changes)) for piece in item.pieces)
    return MergedTensor(item.slot, item.layer, item.part, item.shape, item.pieces[0].source.dtype, parts)


def change_of(piece: Piece, changes: Mapping[str, Change]) -> Change | None:
    """What the adapter does to a piece, by its own name or as a part of all experts."""
    own, slab = changes.get(piece.target), piece.part_of
    whole = None if slab is None else changes.get(slab.target)
    if slab is None or whole is None:
        return own
    if own is not None:
        raise AdapterError(f"the adapter changes {slab.target} as a whole, and {piece.target} as a part of it")
    return whole.of_expert(slab.number, slab.first, piece.source.shape[0])


def _left_out(
    family: Family, item: Bound, bound: Sequence[Bound], checkpoint: Checkpoint, changes: Mapping[str, Change]
) -> bool:
    """Whether `item` is a head that need not be written."""
    if (item.slot, item.part) != (slots.OUTPUT, "weight") or family.head is Head.ALWAYS:
        return False
    tied = _tied(item, bound, checkpoint, changes)
    if family.head is Head.NEVER and not tied:
        raise ArchitectureError(
            f"the output matrix differs from the embedding, and llama.cpp has none of its own for {family.name}",
            "Train neither the head nor the embedding, or both tied",
        )
    return tied


def _tied(item: Bound, bound: Sequence[Bound], checkpoint: Checkpoint, changes: Mapping[str, Change]) -> bool:
    """Whether a head holds the same numbers as the embedding, after the adapter."""
    embedding = next(other for other in bound if other.slot == slots.EMBEDDING)
    (one,), (other,) = item.pieces, embedding.pieces
    changed = [piece.target in changes for piece in (one, other)]
    if all(changed):
        return _same_numbers(_merged(item, changes), _merged(embedding, changes), checkpoint)
    same_source = one.source.name == other.source.name
    return not any(changed) and (same_source or checkpoint.equal(one.source.name, other.source.name))


def _same_numbers(one: MergedTensor, other: MergedTensor, checkpoint: Checkpoint) -> bool:
    pairs = zip(one.blocks(checkpoint), other.blocks(checkpoint), strict=True)
    return one.shape == other.shape and all(np.array_equal(a.rows, b.rows) for a, b in pairs)


def check_finite(name: str, rows: F32) -> None:
    """A sum is finite unless a weight is not (or it overflows, and then the weights are counted for certain)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum()):
            return
    bad = int(np.count_nonzero(~np.isfinite(rows)))
    if bad:
        raise CheckpointError(f"{name} holds {bad} weights that are NaN or infinite", "The base model is damaged")
