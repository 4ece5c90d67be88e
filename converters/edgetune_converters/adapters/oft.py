"""OFT: the inputs of a layer, or the rows of an embedding, rotated in blocks.

Source: PEFT, tuners/oft/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.rotations import (
    cayley,
    cayley_neumann,
    joined_blocks,
    multiplied_by_blocks,
    skew_symmetric,
)
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

_EMBEDDING = "oft_embedding_R"


@dataclass(frozen=True)
class RotatedColumns:
    """The transform W @ R of a matrix with `width` columns, where `blocks` reads the blocks of R [count, b, b]."""

    blocks: Callable[[], F32]
    width: int

    def __call__(self, base: Read, trained: Read) -> Read:
        blocks = joined_blocks(self.blocks(), self.width)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            return multiplied_by_blocks(widened(base(rows, ALL)), blocks)[:, columns]

        return read


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    """y = W (R^T x): W becomes W @ R^T; the rows of an embedding become rows @ R."""
    config = module.config
    role = _EMBEDDING if module.has(_EMBEDDING) else "oft_R"
    shape = module.shape(role)
    size = _block_size(shape[-1]) if len(shape) == 2 else None
    wanted = module.columns // size if size and module.columns % size == 0 else None
    if config.flag("block_share"):
        wanted = wanted and 1
    if wanted is None or size is None or shape[0] != wanted:
        raise Misfit(f"{module.name}: {role} has the shape {list(shape)}, which makes no rotation of {module.columns}")
    vectors = module.tensor(role)
    eps = config.number("eps", 6e-5) / math.sqrt(shape[0]) if config.flag("coft") else None
    series = config.flag("use_cayley_neumann", default=True)
    terms = config.integer("num_cayley_neumann_terms", 5)

    def blocks() -> F32:
        skew = skew_symmetric(vectors(), size)
        if eps is not None:
            skew = _projected(skew, eps)
        rotations = cayley_neumann(skew, terms) if series else cayley(skew)
        return rotations if role == _EMBEDDING else rotations.transpose(0, 2, 1)

    yield Fold(RotatedColumns(blocks, module.columns), changes_nothing=lambda: not vectors().any())


def _block_size(elements: int) -> int | None:
    """The size of a matrix with so many elements above its diagonal."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else None


def _projected(skew: F32, eps: float) -> F32:
    """The matrices with their norms limited to `eps`, as constrained OFT does."""
    norms = np.sqrt(np.square(skew, dtype=np.float64).sum(axis=(1, 2), keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        limited: F32 = np.where(norms <= eps, skew, skew * (eps / norms)).astype(np.float32)
    return limited


OFT = Kind(
    RoleNames("OFT", ("oft_R", _EMBEDDING)),
    _fold,
    fields=frozenset(
        {
            *("r", "oft_block_size", "module_dropout", "bias", "init_weights", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        }
    ),
)
