"""The matrices that can be chosen for, and in what each may be stored.

What a choice costs is time, counted in the bytes that a token has to read: reading them is what its time goes into,
and activations in f32 (accuracy level 1) take twice as long for the same bytes (docs/onnx.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from edgetune_converters.onnx.layout import SourceTensor
from edgetune_converters.onnx.plan import OnnxPlan
from edgetune_converters.onnx.storage import NBitsBlocks

EXACT = 1
"""MatMulNBits' accuracy_level at which activations stay in f32; at 4 they are rounded to 8 bits."""
_SLOWER = 2.0

LEAST = NBitsBlocks(4, 128, symmetric=False)
"""What each matrix is measured in: most blocks of the fixed mix are such."""
WHOLE = NBitsBlocks(8, 128)
"""The least error: what is measured is the distance from a model in such blocks."""
_FOUR = tuple(NBitsBlocks(4, block, symmetric) for block, symmetric in product((128, 64, 32), (True, False)))
STORED = (*_FOUR, WHOLE, NBitsBlocks(8, 64), NBitsBlocks(8, 32))
"""The blocks; 8 bits are only multiplied in 8 bits: anything else is a hundred times slower."""
CANDIDATES = (*STORED, *(replace(codes, accuracy=EXACT) for codes in _FOUR))


@dataclass(frozen=True)
class Matrix:
    """A matrix that is one MatMulNBits; `sources` are the tensors below one another in it."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[SourceTensor, ...]

    @property
    def places(self) -> list[tuple[str, int]]:
        """Slot and layer of each source."""
        return [(source.slot[0], source.slot[1]) for source in self.sources if source.slot[1] is not None]

    def bytes(self, storage: NBitsBlocks) -> int:
        """Their size in a storage."""
        return sum(spec.bytes for spec in storage.specs(self.shape))

    def cost(self, storage: NBitsBlocks) -> float:
        """Its time for a token, as bytes that are read at the usual accuracy."""
        return self.bytes(storage) * (_SLOWER if storage.accuracy == EXACT else 1.0)


def label(storage: NBitsBlocks) -> str:
    """As reasons and receipts say it."""
    return storage.name + (" in f32" if storage.accuracy == EXACT else "")


def matrices_of(apart: OnnxPlan) -> list[Matrix]:
    """The matrices of the layers, from a plan in which query, key and value stand alone.

    Not among them: experts, which are multiplied by another operator, and the head, which has a rule of its own.
    """
    return [
        Matrix(weight.name, weight.shape, tuple(part.source for part in weight.parts))
        for weight, storage in apart.chosen
        if isinstance(storage, NBitsBlocks)
        and len(weight.shape) == 2
        and all(part.source.slot[1] is not None for part in weight.parts)
    ]


def fixed_mix(plan: OnnxPlan, matrices: list[Matrix]) -> Mapping[Matrix, NBitsBlocks]:
    """What each matrix gets without a measurement."""
    of_source = {part.source: storage for weight, storage in plan.chosen for part in weight.parts}
    found = {matrix: of_source[matrix.sources[0]] for matrix in matrices}
    return {matrix: storage for matrix, storage in found.items() if isinstance(storage, NBitsBlocks)}
