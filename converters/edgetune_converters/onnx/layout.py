"""Group the merged tensors into the weights of a graph, and lay out the file of weights.

Matrices with the same input are stacked into one weight, so that one product computes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from edgetune_converters.architectures.decoder import Slot
from edgetune_converters.onnx.storage import ALIGNMENT, ArraySpec, Storage

_LAYER = "model.layers.{layer}."

# slot -> the weight that it is a part of, and the index of the part
_NAMES: Mapping[str, tuple[str, int]] = {
    "embedding": ("model.embed_tokens", 0),
    "embedding_norm": ("model.embed_norm", 0),
    "position_embedding": ("model.embed_positions", 0),
    "output_norm": ("model.norm", 0),
    "output": ("lm_head", 0),
    "attention_norm": (_LAYER + "input_norm", 0),
    "attention_norm_2": (_LAYER + "input_norm_2", 0),
    "attention_qkv": (_LAYER + "attn.qkv_proj", 0),
    "attention_q": (_LAYER + "attn.qkv_proj", 0),
    "attention_k": (_LAYER + "attn.qkv_proj", 1),
    "attention_v": (_LAYER + "attn.qkv_proj", 2),
    "attention_q_norm": (_LAYER + "attn.q_norm", 0),
    "attention_k_norm": (_LAYER + "attn.k_norm", 0),
    "attention_output": (_LAYER + "attn.o_proj", 0),
    "attention_post_norm": (_LAYER + "attn_post_norm", 0),
    "ffn_norm": (_LAYER + "mlp_norm", 0),
    "ffn_gate": (_LAYER + "mlp.gate_up_proj", 0),
    "ffn_up": (_LAYER + "mlp.gate_up_proj", 1),
    "ffn_down": (_LAYER + "mlp.down_proj", 0),
    "ffn_post_norm": (_LAYER + "mlp_post_norm", 0),
    "expert_router": (_LAYER + "moe.router", 0),
    "expert_gate": (_LAYER + "moe.gate_up_proj", 0),
    "expert_up": (_LAYER + "moe.gate_up_proj", 1),
    "expert_down": (_LAYER + "moe.down_proj", 0),
    "shared_router": (_LAYER + "moe.shared.router", 0),
    "shared_gate": (_LAYER + "moe.shared.gate_up_proj", 0),
    "shared_up": (_LAYER + "moe.shared.gate_up_proj", 1),
    "shared_down": (_LAYER + "moe.shared.down_proj", 0),
}

# names of slots that are not stacked
_ALONE: Mapping[str, str] = {
    "attention_q": _LAYER + "attn.q_proj",
    "attention_k": _LAYER + "attn.k_proj",
    "attention_v": _LAYER + "attn.v_proj",
}


class SourceTensor(NamedTuple):
    """A tensor of the pass: its index, slot, shape, and dtype in the base."""

    number: int
    slot: Slot
    shape: tuple[int, ...]
    dtype: str


class WeightPart(NamedTuple):
    """The rows of a tensor in a weight: rows first, first + step, ... of the weight, or of each expert in it."""

    source: SourceTensor
    first: int
    step: int = 1

    @property
    def rows(self) -> int:
        """Number of rows, of all experts together; each element of a vector is a row."""
        return math.prod(self.source.shape[:-1]) if len(self.source.shape) > 1 else self.source.shape[0]


@dataclass(frozen=True)
class Weight:
    """A matrix or vector of the graph, and the tensors that it is made of; `shape` as in NumPy."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightPart, ...]

    @property
    def rows(self) -> int:
        """Number of rows, of all experts together; each element of a vector is a row."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def slots(self) -> tuple[str, ...]:
        """Slots of its parts."""
        return tuple(part.source.slot[0] for part in self.parts)


@dataclass(frozen=True)
class ExternalArray:
    """An array in the file of weights, `spec.bytes` from byte `offset` on."""

    name: str
    spec: ArraySpec
    offset: int


@dataclass(frozen=True)
class WeightLayout:
    """A weight with its storage and the offsets of its arrays."""

    weight: Weight
    storage: Storage
    arrays: tuple[ExternalArray, ...]


def has_place(slot: str) -> bool:
    """Whether a graph uses the tensors of a slot."""
    return slot in _NAMES


def group_weights(
    sources: Sequence[SourceTensor],
    storage: Callable[[SourceTensor], Storage],
    *,
    interleave: bool = True,
    apart: bool = False,
) -> list[Weight]:
    """Return the weights that the tensors make, in the order of their first tensors.

    Args:
        sources: The tensors.
        storage: Returns the storage of a tensor; only matrices of equal storage are stacked.
        interleave: Interleave the rows of gate and up of experts, as ONNX Runtime's MoE expects.
        apart: Do not stack query, key and value.
    """
    together: dict[tuple[str, int | None], set[Storage]] = {}
    for source in sources:
        slot, layer, part = source.slot
        if part == "weight":
            together.setdefault((_NAMES[slot][0], layer), set()).add(storage(source))
    parts: dict[str, list[SourceTensor]] = {}
    for source in sources:
        slot, layer, part = source.slot
        joined = len(together.get((_NAMES[slot][0], layer), ())) < 2 and not (apart and slot in _ALONE)
        name = _NAMES[slot][0] if joined else _ALONE[slot]
        parts.setdefault(f"{name.format(layer=layer)}.{part}", []).append(source)
    ordered = ((name, sorted(found, key=lambda source: _NAMES[source.slot[0]][1])) for name, found in parts.items())
    return [_weight(name, found, interleave) for name, found in ordered]


def _weight(name: str, sources: Sequence[SourceTensor], interleave: bool) -> Weight:
    """Stack tensors along the first axis, or the second where the first counts experts."""
    first = sources[0].shape
    axis = 1 if len(first) == 3 else 0
    rows = [source.shape[axis] for source in sources]
    shape = (*first[:axis], sum(rows), *first[axis + 1 :])
    if axis and interleave:
        return Weight(name, shape, tuple(WeightPart(source, at, len(sources)) for at, source in enumerate(sources)))
    firsts = accumulate(rows, initial=0)
    return Weight(name, shape, tuple(WeightPart(source, at) for source, at in zip(sources, firsts, strict=False)))


def lay_out(chosen: Sequence[tuple[Weight, Storage]], start: int = 0) -> Iterator[WeightLayout]:
    """Yield the layout of each weight, its arrays aligned to pages, from byte `start` on."""
    offset = start
    for weight, storage in chosen:
        arrays = []
        for spec in storage.specs(weight.shape):
            offset = align_to_page(offset)
            arrays.append(ExternalArray(weight.name + spec.suffix, spec, offset))
            offset += spec.bytes
        yield WeightLayout(weight, storage, tuple(arrays))


def align_to_page(offset: int) -> int:
    """Return the next page boundary."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def view_as(array: ExternalArray, suffix: str, shape: tuple[int, ...]) -> ExternalArray:
    """Return the same bytes under another name and shape."""
    assert math.prod(shape) == math.prod(array.spec.shape)
    return ExternalArray(array.name + suffix, array.spec._replace(shape=shape), array.offset)
