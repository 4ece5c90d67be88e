"""BOFT: the inputs of a layer rotated by a product of butterfly factors, and its outputs scaled.

Each factor rotates blocks of permuted inputs. Source: PEFT, tuners/boft/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.rotations import cayley, joined_blocks, multiplied_by_blocks
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened


@dataclass(frozen=True)
class _Butterflies:
    """The transform diag(s) @ W @ (B_m ... B_1)^T, with B_i = P_i @ blocks_i @ P_i^T."""

    blocks: Callable[[], F32]
    scales: Callable[[], F32]

    def __call__(self, base: Read, trained: Read) -> Read:
        stored, scales = self.blocks(), self.scales().reshape(-1)
        count, number, size, _ = stored.shape
        turned = []
        for index, one in enumerate(stored):
            rotations = cayley((one - one.transpose(0, 2, 1)) * np.float32(0.5))
            order = _permutation(number * size, number >> index, size // 2, count)
            turned.append((order, np.argsort(order), joined_blocks(rotations.transpose(0, 2, 1), number * size)))

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            found = widened(base(rows, ALL))
            for order, inverse, blocks in turned:
                found = multiplied_by_blocks(np.ascontiguousarray(found[:, inverse]), blocks)[:, order]
            return found[:, columns] * scales[rows][:, None]

        return read


def _permutation(width: int, groups: int, half: int, factors: int) -> NDArray[np.intp]:
    """The order of inputs of one factor: in each of `groups`, runs of `half` at even places, then those at odd ones."""
    order = np.arange(width)
    if factors == 1:
        return order
    runs = order.reshape(groups, -1, half)
    return np.concatenate([runs[:, 0::2], runs[:, 1::2]], axis=1).reshape(-1)


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    shape = module.shape("boft_R")
    fits = len(shape) == 4 and shape[2] == shape[3] and shape[1] * shape[2] == module.columns
    if not fits or (shape[0] > 1 and (shape[1] % 2 ** (shape[0] - 1) or shape[2] % 2)):
        raise Misfit(f"{module.name}: boft_R has the shape {list(shape)}, which makes no rotation of {module.columns}")
    blocks = module.tensor("boft_R")
    scales = module.tensor("boft_s", (module.rows, 1))

    def changes_nothing() -> bool:
        stored = blocks()
        return bool((scales() == 1).all()) and np.array_equal(stored, stored.swapaxes(-1, -2))

    yield Fold(_Butterflies(blocks, scales), changes_nothing=changes_nothing)


BOFT = Kind(
    RoleNames("BOFT", ("boft_R", "boft_s")),
    _fold,
    fields=frozenset(
        {
            *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "bias", "init_weights"),
        }
    ),
)
