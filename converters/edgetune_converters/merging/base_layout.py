"""The merged model under the base's own names and in its own layout, as a safetensors directory needs it.

The architecture's operations for GGUF (permuted rows, parts of fused matrices, constants) do not apply: each source
keeps its layout, with the same change and the same merge base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgetune_converters.adapters.change import Change
from edgetune_converters.architectures import BoundTensor, Family, slots
from edgetune_converters.architectures.operations import COPY, Take, View
from edgetune_converters.merging.stream import BLOCK_BYTES, MakeBlock, MergedTensor, TensorPart
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import TensorInfo


@dataclass(frozen=True)
class BaseTensor:
    """A tensor to be written: `name` and `shape` as in the base, `part` its source and change.

    `further` are the parts that follow it, where several tensors of the base become one.
    """

    name: str
    shape: tuple[int, ...]
    part: TensorPart
    further: tuple[TensorPart, ...] = ()

    @property
    def source(self) -> TensorInfo:
        """The base tensor that is read, or the first of them."""
        return self.part.piece.source

    @property
    def parts(self) -> tuple[TensorPart, ...]:
        """All parts, in order."""
        return self.part, *self.further

    @property
    def sources(self) -> set[str]:
        """The names of the sources."""
        return {part.piece.source.name for part in self.parts}

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(part.piece.source.bytes for part in self.parts)

    def pieces(self, checkpoint: Checkpoint, limit: int = BLOCK_BYTES) -> Iterator[MakeBlock]:
        """Yield the tasks that make its blocks, in order, of at most `limit` bytes of f32.

        A task raises CheckpointError for NaN or infinity.
        """
        for part in self.parts:
            yield from part.pieces(checkpoint, limit)


def base_tensors(
    family: Family,
    stored: Mapping[str, TensorInfo],
    tensors: Sequence[MergedTensor],
    bound: Sequence[BoundTensor],
    changes: Mapping[str, Change],
) -> list[BaseTensor]:
    """Return every tensor of the base once, and the head where it no longer equals a tied embedding.

    A layout that transformers does not load becomes the one that it does (`Family.loaded_names`).

    `stored` are the tensors of the checkpoint: the table changes the shape of some.
    """
    parts: dict[tuple[str, str], TensorPart] = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        parts.setdefault((part.piece.source.name, part.piece.target), part)
    untied = any(tensor.slot == slots.OUTPUT for tensor in tensors)
    for item in bound:
        for piece in item.pieces:
            own = family.canonical_name(piece.source.name) == piece.target
            if own or untied:  # a head that GGUF omits, but the base has
                parts.setdefault((piece.source.name, piece.target), TensorPart(piece, changes.get(piece.target)))
    return _as_loaded(
        family, [_as_stored(family, part, stored[part.piece.source.name].shape) for part in parts.values()]
    )


def _as_stored(family: Family, part: TensorPart, shape: tuple[int, ...]) -> BaseTensor:
    own = family.canonical_name(part.piece.source.name) == part.piece.target
    seen = replace(part, piece=replace(part.piece, view=COPY))
    return BaseTensor(part.piece.source.name if own else part.piece.target, shape, seen)


def _as_loaded(family: Family, tensors: Sequence[BaseTensor]) -> list[BaseTensor]:
    """The tensors in the layout that transformers loads."""
    groups: dict[str, list[BaseTensor]] = {}
    for tensor in tensors:
        groups.setdefault(family.loaded_name(tensor.name), []).append(tensor)
    return [_joined(name, group) for name, group in groups.items()]


def _joined(name: str, group: Sequence[BaseTensor]) -> BaseTensor:
    """Matrices of several experts, transposed, or their biases, as one tensor."""
    first = group[0]
    if len(group) == 1:
        return replace(first, name=name)
    parts = tuple(_transposed(tensor) for tensor in group)
    return BaseTensor(name, (len(group), *reversed(first.shape)), parts[0], parts[1:])


def _transposed(tensor: BaseTensor) -> TensorPart:
    if len(tensor.shape) < 2:
        return tensor.part
    view = View(transpose=Take(tensor.shape[0], 0, tensor.shape[0]))
    return replace(tensor.part, piece=replace(tensor.part.piece, view=view))
