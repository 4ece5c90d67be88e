"""Changes of single weights: SHiRA, and the sparse part of Supertuning and WaveFT.

Sources: PEFT, tuners/shira/layer.py, tuners/supertuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.change import added
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.products import product
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import F32, RowIndex

Places = NDArray[np.int64]


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix [height, width] that is zero but at some places; values at one place are added."""

    rows: Places
    columns: Places
    values: F32
    height: int
    width: int

    @classmethod
    def sorted_by_row(cls, rows: Places, columns: Places, values: F32, shape: tuple[int, int]) -> SparseMatrix:
        """Return the matrix of values at places in any order."""
        order = np.lexsort((columns, rows))
        return cls(rows[order], columns[order], values[order], *shape)

    def __call__(self, rows: RowIndex, columns: RowIndex) -> F32:
        """Return some rows and columns of the matrix."""
        own_rows, own_columns = np.arange(self.height)[rows], np.arange(self.width)[columns]
        found = np.zeros((len(own_rows), len(own_columns)), np.float32)
        if not len(own_rows):
            return found
        first, last = np.searchsorted(self.rows, (own_rows.min(), own_rows.max() + 1))
        row = _positions(own_rows, self.height)[self.rows[first:last]]
        column = _positions(own_columns, self.width)[self.columns[first:last]]
        kept = (row >= 0) & (column >= 0)
        np.add.at(found, (row[kept], column[kept]), self.values[first:last][kept])
        return found


def _positions(numbers: NDArray[np.intp], count: int) -> Places:
    """Return the position of each of `count` numbers in `numbers`, -1 where it is not there."""
    found = np.full(count, -1, np.int64)
    found[numbers] = np.arange(len(numbers))
    return found


def check_places(module: AdaptedModule, places: Places, count: int) -> Places:
    """Return numbers of places. Raises Misfit for one outside of the matrix."""
    if len(places) and not (places.min() >= 0 and places.max() < count):
        raise Misfit(f"{module.name} changes the place {places.max()}, and the base has {count}")
    return places


def _shira(module: AdaptedModule) -> Iterator[Fold]:
    (count,) = module.shape("weight")
    values = module.tensor("weight", (count,))
    rows, columns = module.integers("indices", (2, count))()
    check_places(module, rows, module.rows)
    check_places(module, columns, module.columns)
    shape = module.rows, module.columns
    yield Fold(
        added(lambda: SparseMatrix.sorted_by_row(rows, columns, values().reshape(-1), shape)),
        changes_nothing=lambda: not values().any(),
    )


def _supertuning(module: AdaptedModule) -> Iterator[Fold]:
    (count,) = module.shape("values")
    values = module.tensor("values", (count,))
    if not module.has("indices"):
        raise Misfit(f"{module.name} has no indices: they were not saved (save_precomputed_indices)")
    places = check_places(module, module.integers("indices", (count,))(), module.rows * module.columns)
    pair: Callable[[], tuple[F32, F32]] | None = None
    if module.has("lora_A"):
        rank = module.shape("lora_A")[0]
        a, b = module.tensor("lora_A", (rank, module.columns)), module.tensor("lora_B", (module.rows, rank))
        scale = np.float32(module.config.number("lora_alpha") / rank)
        pair = lambda: (b() * scale, a())  # noqa: E731

    def delta() -> Callable[[RowIndex, RowIndex], F32]:
        shape = module.rows, module.columns
        single = SparseMatrix.sorted_by_row(*np.divmod(places, module.columns), values().reshape(-1), shape)
        if pair is None:
            return single
        left, right = pair()
        return lambda rows, columns: single(rows, columns) + product(left, right, rows, columns)

    yield Fold(
        added(delta), changes_nothing=lambda: not values().any() and (pair is None or not all(map(np.any, pair())))
    )


SHIRA = Kind(
    RoleNames("SHiRA", ("shira_weight", "shira_indices"), prefix="shira_", integers=("shira_indices",)),
    _shira,
    fields=frozenset({"r", "mask_type", "random_seed", "init_weights"}),
)
SUPERTUNING = Kind(
    RoleNames(
        "Supertuning",
        ("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"),
        prefix="supertuning_",
        integers=("supertuning_indices",),
    ),
    _supertuning,
    fields=frozenset(
        {"sparsity", "select_top", "save_precomputed_indices", "r", "lora_alpha", "lora_dropout", "init_weights"}
    ),
)
