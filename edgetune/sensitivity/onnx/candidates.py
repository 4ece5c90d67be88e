"""The matrices whose storage is searched, and the candidate storages.

The cost of a storage is time, counted in the bytes that are read for each token, because reading dominates the time of
a token. Activations in f32 (accuracy level 1) take twice as long for the same bytes (docs/onnx.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from edgetune_converters.onnx.layout import SourceTensor
from edgetune_converters.onnx.plan import OnnxPlan
from edgetune_converters.onnx.storage import NBitsBlocks

F32_ACTIVATIONS = 1
"""MatMulNBits' accuracy_level at which activations stay in f32; at 4 they are rounded to 8 bits."""
_SLOWER = 2.0

COARSEST = NBitsBlocks(4, 128, symmetric=False)
"""The storage in which each matrix is measured alone: most of the fixed mix has it."""
FINEST = NBitsBlocks(8, 128)
"""The storage with the least error: divergences are measured from a model that has it in all matrices."""
_FOUR = tuple(NBitsBlocks(4, block, symmetric) for block, symmetric in product((128, 64, 32), (True, False)))
STORAGES = (*_FOUR, FINEST, NBitsBlocks(8, 64), NBitsBlocks(8, 32))
"""The storages. 8-bit blocks are multiplied with 8-bit activations only: f32 is a hundred times slower."""
CANDIDATES = (*STORAGES, *(replace(codes, accuracy=F32_ACTIVATIONS) for codes in _FOUR))


@dataclass(frozen=True)
class Matrix:
    """A matrix of one MatMulNBits; `sources` are the tensors whose rows are stacked in it."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[SourceTensor, ...]

    @property
    def slots(self) -> list[tuple[str, int]]:
        """Return slot and layer of each source."""
        return [(source.slot[0], source.slot[1]) for source in self.sources if source.slot[1] is not None]

    def bytes(self, storage: NBitsBlocks) -> int:
        """Return the bytes of the matrix in a storage."""
        return sum(spec.bytes for spec in storage.specs(self.shape))

    def cost(self, storage: NBitsBlocks) -> float:
        """Return the time for a token, as the bytes that would take as long with 8-bit activations."""
        return self.bytes(storage) * (_SLOWER if storage.accuracy == F32_ACTIVATIONS else 1.0)


def label(storage: NBitsBlocks) -> str:
    """Return the name of a storage for reasons and receipts."""
    return storage.name + (" in f32" if storage.accuracy == F32_ACTIVATIONS else "")


def matrices_of(separate_plan: OnnxPlan) -> list[Matrix]:
    """Return the matrices of the layers, from a plan with query, key and value as matrices of their own.

    Experts, which another operator multiplies, and the head, which has a rule of its own, are not among them.
    """
    return [
        Matrix(weight.name, weight.shape, tuple(part.source for part in weight.parts))
        for weight, storage in separate_plan.chosen
        if isinstance(storage, NBitsBlocks)
        and len(weight.shape) == 2
        and all(part.source.slot[1] is not None for part in weight.parts)
    ]


def fixed_mix(plan: OnnxPlan, matrices: list[Matrix]) -> Mapping[Matrix, NBitsBlocks]:
    """Return the storage of each matrix in the fixed mix."""
    of_source = {part.source: storage for weight, storage in plan.chosen for part in weight.parts}
    found = {matrix: of_source[matrix.sources[0]] for matrix in matrices}
    return {matrix: storage for matrix, storage in found.items() if isinstance(storage, NBitsBlocks)}
