"""HRA: the inputs of a layer reflected by a chain of Householder matrices.

W becomes W @ H_1 ... H_r, with H_i = I - 2 u_i u_i^T, or W @ (I - 2 U U^T) where U is made orthogonal (apply_GS).
Source: PEFT, tuners/hra/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.products import matrix_product
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened


@dataclass(frozen=True)
class _Reflected:
    """The transform W - (W @ M) @ U^T of a matrix: the product of the reflections, as one of rank r."""

    vectors: Callable[[], F32]
    orthogonal: bool

    def __call__(self, base: Read, trained: Read) -> Read:
        directions = self.vectors().astype(np.float64)
        unit = _orthonormal(directions) if self.orthogonal else directions / np.linalg.norm(directions, axis=0)
        mixed = unit * 2 if self.orthogonal else unit @ _compact(unit)
        left, right = (-mixed).astype(np.float32), np.ascontiguousarray(unit.T.astype(np.float32))

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            every = np.ascontiguousarray(widened(base(rows, ALL)))
            weights = matrix_product(every, left)
            own = np.ascontiguousarray(every[:, columns])
            merged: F32 = edgetune_native.add_product(own, weights, np.ascontiguousarray(right[:, columns]))
            return merged

        return read


def _compact(unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """T of H_1 ... H_r = I - U T U^T, upper triangular. Source: Schreiber and Van Loan (1989), compact WY form."""
    rank = unit.shape[1]
    found = np.zeros((rank, rank))
    for index in range(rank):
        found[:index, index] = -2 * found[:index, :index] @ (unit[:, :index].T @ unit[:, index])
        found[index, index] = 2
    return found


def _orthonormal(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """The directions made orthogonal one after the other (modified Gram-Schmidt)."""
    found = directions.copy()
    for index in range(found.shape[1]):
        for before in range(index):
            found[:, index] -= (found[:, before] @ found[:, index]) * found[:, before]
        found[:, index] /= np.linalg.norm(found[:, index])
    return found


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    vectors = module.tensor("hra_u", (module.columns, module.config.integer("r")))
    orthogonal = module.config.flag("apply_GS")

    def changes_nothing() -> bool:
        """Pairs of equal reflections cancel: so training begins."""
        stored = vectors()
        return not orthogonal and np.array_equal(stored[:, 0::2], stored[:, 1::2])

    yield Fold(_Reflected(vectors, orthogonal), changes_nothing=changes_nothing)


HRA = Kind(RoleNames("HRA", ("hra_u",)), _fold, fields=frozenset({"r", "apply_GS", "bias", "init_weights"}))
