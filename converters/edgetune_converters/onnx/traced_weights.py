"""The weights of a traced graph: how the graph uses each, its storage, and the nodes that read it.

torch.onnx.export writes a linear layer as MatMul with the transposed weight, an embedding as Gather, and experts
(batched_mm) as Gather from a stack of matrices. Quantized, these become MatMulNBits and GatherBlockQuantized, operators
of ONNX Runtime; weights with other uses stay unquantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onnx import NodeProto, TensorProto, helper

from edgetune_converters.architectures import BoundTensor
from edgetune_converters.architectures.decoder import Slot
from edgetune_converters.onnx.builder import CONTRIB
from edgetune_converters.onnx.layout import SourceTensor
from edgetune_converters.onnx.plan import OnnxRecipe, OnnxSettings, fit_block, requested_storage
from edgetune_converters.onnx.storage import Floats, NBitsBlocks, Storage

_TRANSPOSED = [1, 0]
_F32 = Floats("f32")

SlotLookup = Callable[[str], Slot | None]
"""Returns the slot of a weight by its name, or None where the family's table has none."""


class WeightUsage(NamedTuple):
    """How a weight is used: in products with its transpose, in lookups of its rows, or otherwise."""

    multiplied: bool
    looked_up: bool
    otherwise: bool = False


@dataclass(frozen=True)
class WeightNodes:
    """The nodes that read a weight: those that transpose it, the products after them, lookups, and others."""

    transposes: tuple[NodeProto, ...]
    products: tuple[NodeProto, ...]
    lookups: tuple[NodeProto, ...]
    others: tuple[NodeProto, ...]

    @property
    def usage(self) -> WeightUsage:
        """How the weight is used."""
        return WeightUsage(bool(self.products), bool(self.lookups), bool(self.others))


class NodeIndex:
    """The nodes of a graph by the values that they read."""

    def __init__(self, graph: Any) -> None:
        self._taking: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._taking.setdefault(name, []).append(node)

    def of(self, name: str) -> WeightNodes:
        """Return the nodes that read a weight."""
        transposes: list[NodeProto] = []
        products: list[NodeProto] = []
        lookups: list[NodeProto] = []
        others: list[NodeProto] = []
        for node in self._taking.get(name, ()):
            after = self._taking.get(node.output[0], []) if _transposes(node) else []
            if after and all(_multiplies(other, node.output[0]) for other in after):
                transposes.append(node)
                products += after
            elif node.op_type == "Gather" and node.input[0] == name and _attributes(node).get("axis", 0) == 0:
                lookups.append(node)
            else:
                others.append(node)
        return WeightNodes(tuple(transposes), tuple(products), tuple(lookups), tuple(others))


def _transposes(node: NodeProto) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and list(_attributes(node).get("perm", ())) == _TRANSPOSED


def _multiplies(node: NodeProto, matrix: str) -> bool:
    return node.op_type == "MatMul" and list(node.input).index(matrix) == 1


def _attributes(node: NodeProto) -> Mapping[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def slots_by_name(bound: Sequence[BoundTensor]) -> SlotLookup:
    """Return a lookup by names of the checkpoint, with or without the prefixes that transformers adds."""
    known = {
        name: (item.slot, item.layer, item.part)
        for item in bound
        for piece in item.pieces
        for name in (piece.source.name, piece.target)
    }

    def slot_of(name: str) -> Slot | None:
        parts = name.split(".")
        found = (known.get(".".join(parts[start:])) for start in range(len(parts)))
        return next((slot for slot in found if slot is not None), None)

    return slot_of


def choose_storage(
    name: str, shape: Sequence[int], usage: WeightUsage, types: OnnxRecipe, settings: OnnxSettings, slot: Slot | None
) -> tuple[Storage, Storage]:
    """Return the storage of a weight, and the one that the type asks for, which its rows or uses may not allow.

    Vectors (norms, biases) stay in f32: they are small, and an error in them affects every row.
    """
    if not isinstance(types.matrices, NBitsBlocks):
        kind = types.matrices if len(shape) > 1 else _F32
        return kind, kind
    if name.endswith("bias"):
        return _F32, _F32
    tied = usage.multiplied and usage.looked_up
    requested, _ = requested_storage(
        types, SourceTensor(0, slot or _guessed(shape, usage), tuple(shape), "F32"), tied, settings
    )
    if not isinstance(requested, NBitsBlocks):
        return requested, requested
    if usage.otherwise:
        return Floats("f16"), requested
    stored = fit_block(requested, {shape[-1]}) if usage.looked_up else requested
    return stored, requested if isinstance(stored, Floats) else stored


def _guessed(shape: Sequence[int], usage: WeightUsage) -> Slot:
    """Return a slot for a weight that the family's table does not have."""
    if len(shape) > 2:
        return "expert_gate", 0, "weight"
    return ("embedding", None, "weight") if usage.looked_up else ("", 0, "weight")


def replacement_nodes(
    name: str, shape: Sequence[int], use: WeightNodes, storage: NBitsBlocks
) -> list[tuple[NodeProto, NodeProto | None]]:
    """Return the replacement of each node (None removes it), on arrays NAME.codes, NAME.scales, NAME.zero_points."""
    changed: list[tuple[NodeProto, NodeProto | None]] = [(node, None) for node in use.transposes]
    changed += [(node, _product(name, shape, node, storage)) for node in use.products]
    return changed + [(node, _lookup(name, shape, node, storage)) for node in use.lookups]


def _product(name: str, shape: Sequence[int], node: NodeProto, storage: NBitsBlocks) -> NodeProto:
    inputs = [node.input[0], *(name + spec.suffix for spec in storage.specs(tuple(shape)))]
    sizes = {"K": shape[1], "N": shape[0], "bits": storage.bits, "block_size": storage.block}
    sizes["accuracy_level"] = storage.accuracy
    return helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain=CONTRIB, **sizes)


def _lookup(name: str, shape: Sequence[int], node: NodeProto, storage: NBitsBlocks) -> NodeProto:
    inputs = [rows_name(name), node.input[1], f"{name}.scales"]
    sizes = {"bits": storage.bits, "block_size": storage.block}
    return helper.make_node(
        "GatherBlockQuantized", inputs, list(node.output), name=node.name, domain=CONTRIB, gather_axis=0,
        quantize_axis=len(shape) - 1, **sizes,
    )  # fmt: skip


def rows_name(name: str) -> str:
    """Return the name of the quantized rows in the shape that a lookup needs, all blocks of a row on one axis."""
    return f"{name}.codes.rows"


def cast_to_f32(name: str) -> NodeProto:
    """Return the node that casts a 16-bit weight to f32."""
    return helper.make_node("Cast", [name], [f"{name}.f32"], name=f"{name}.f32/Cast", to=TensorProto.FLOAT)
