"""The stream of merged tensors: base plus adapter in blocks of rows, one block alive at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune_converters.adapters import Change
from edgetune_converters.architectures import Bound, Family, ModelConfig, slots
from edgetune_converters.architectures.operations import OPERATIONS
from edgetune_converters.checkpoint import F32, Checkpoint, Rows
from edgetune_converters.errors import CheckpointError

BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Block:
    """Rows of a merged tensor, f32 [n, k]; `delta` is the part that the adapter added, None without one."""

    rows: F32
    delta: F32 | None = None


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: `shape` as numpy says it, `dtype` as the base stored it."""

    slot: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    dtype: str
    bound: Bound | None = None
    change: Change | None = None
    values: F32 | None = None

    @property
    def gguf_name(self) -> str:
        """Its name in a GGUF file."""
        return slots.gguf_name(self.slot, self.layer, self.part)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for it."""
        return self.bound.source.bytes if self.bound else 0

    def blocks(self, checkpoint: Checkpoint, head_dim: int, limit: int = BLOCK_BYTES) -> Iterator[Block]:
        """The rows in order, at most `limit` bytes of f32 at a time (at least one row).

        Errors: CheckpointError when a weight is NaN or infinite.
        """
        if self.bound is None:
            assert self.values is not None
            yield Block(self.values.reshape(1, -1))
            return
        factors = self.change.factors() if self.change and self.change.factors else None
        for rows in self._row_blocks(self.bound, head_dim, limit):
            base = self._base(checkpoint, self.bound, rows)
            delta = None if factors is None else factors[0][rows] @ factors[1]
            if delta is not None:
                base += delta
            _check_finite(self.bound.source.name, base)
            # a tensor of one dimension was read as a column, but is one row of the file
            yield Block(base, delta) if len(self.shape) > 1 else Block(base.reshape(1, -1))

    def _row_blocks(self, bound: Bound, head_dim: int, limit: int) -> Iterator[Rows]:
        count = self.shape[0] if len(self.shape) == 1 else math.prod(self.shape[:-1])
        step = count if len(self.shape) == 1 else max(1, limit // (4 * self.shape[-1]))
        for first in range(0, count, step):
            yield OPERATIONS[bound.operation](first, min(first + step, count), head_dim)

    def _base(self, checkpoint: Checkpoint, bound: Bound, rows: Rows) -> F32:
        replaced = self.change.replaced(rows) if self.change else None
        return checkpoint.rows(bound.source.name, rows) if replaced is None else replaced


def merged_tensors(
    family: Family, config: ModelConfig, checkpoint: Checkpoint, bound: Sequence[Bound], changes: Mapping[str, Change]
) -> list[MergedTensor]:
    """All tensors of the merged model in the order in which they are written.

    A head that is, and stays, equal to the embedding is left out: readers then use the embedding.
    """
    tensors = [_merged(item, changes.get(item.target)) for item in bound if not _tied(item, bound, checkpoint, changes)]
    for row in family.generated:
        values = row.compute(config)
        if values is not None:
            tensors.append(MergedTensor(row.slot, None, "weight", values.shape, "F32", values=values))
    return sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.gguf_name))


def _merged(item: Bound, change: Change | None) -> MergedTensor:
    return MergedTensor(item.slot, item.layer, item.part, item.source.shape, item.source.dtype, item, change)


def _tied(item: Bound, bound: Sequence[Bound], checkpoint: Checkpoint, changes: Mapping[str, Change]) -> bool:
    """Whether `item` is a head that holds the same numbers as the embedding, after the adapter."""
    if item.slot != slots.OUTPUT or item.part != "weight":
        return False
    embedding = next(other for other in bound if other.slot == slots.EMBEDDING)
    changed = [other.target in changes for other in (item, embedding)]
    if all(changed):
        head, first = (_merged(other, changes[other.target]) for other in (item, embedding))
        return _same_numbers(head, first, checkpoint)
    same_source = item.source.name == embedding.source.name
    return not any(changed) and (same_source or checkpoint.equal(item.source.name, embedding.source.name))


def _same_numbers(one: MergedTensor, other: MergedTensor, checkpoint: Checkpoint) -> bool:
    pairs = zip(one.blocks(checkpoint, 1), other.blocks(checkpoint, 1), strict=True)
    return one.shape == other.shape and all(np.array_equal(a.rows, b.rows) for a, b in pairs)


def _check_finite(name: str, rows: F32) -> None:
    """A sum is finite unless a weight is not (or it overflows, and then the weights are counted for certain)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum()):
            return
    bad = int(np.count_nonzero(~np.isfinite(rows)))
    if bad:
        raise CheckpointError(f"{name} holds {bad} weights that are NaN or infinite", "The base model is damaged")
