"""Kinds that divide the matrix into blocks: MiSS, GraLoRA, C3A.

Sources: PEFT, tuners/miss/layer.py, tuners/gralora/layer.py, tuners/c3a/utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.change import added
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.products import matrix_product
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

# -- MiSS --------------------------------------------------------------------------------------------------------------


def _miss(module: AdaptedModule) -> Iterator[Fold]:
    variant = module.config.raw.get("init_weights", True)
    if variant == "bat":
        rank = module.shape("block")[-1]
        if module.rows % rank or module.columns % rank:
            raise Misfit(f"{module.name} [{module.rows}, {module.columns}] does not divide into blocks of {rank}")
        block = module.tensor("block", (module.rows // rank, rank, rank))
        yield Fold(apply=lambda base, trained: _ByBlock(base, block()), changes_nothing=lambda: not block().any())
        return
    rank = module.shape("block")[0]
    width = module.config.integer("mini_r", 1) if variant == "mini" else module.rows
    if width == 0 or module.rows % width:
        raise Misfit(f"{module.name} has {module.rows} rows, which mini_r ({width}) does not divide")
    block = module.tensor("block", (rank, width))

    def factors() -> tuple[F32, F32]:
        """Each group of `rank` inputs is multiplied with the same rows."""
        left = np.tile(block().T, (module.rows // width, 1))
        right = (np.arange(module.columns) % rank == np.arange(rank)[:, None]).astype(np.float32)
        return np.ascontiguousarray(left), right

    yield Fold(factors=factors)


class _ByBlock:
    """W + W' @ B + B, for each square block W' of W and the block B of its rows."""

    def __init__(self, base: Read, blocks: F32) -> None:
        self._base, self._blocks = base, blocks
        self._rank = blocks.shape[-1]

    def __call__(self, rows: RowIndex, columns: RowIndex) -> F32:
        read = widened(self._base(rows, ALL))
        numbers = np.arange(len(self._blocks) * self._rank)[rows]
        of_block, inside = np.divmod(numbers, self._rank)
        found = np.array(read, np.float32)
        for one in np.unique(of_block):
            own = np.flatnonzero(of_block == one)
            block = self._blocks[one]
            parts = read[own].reshape(-1, self._rank)
            change = matrix_product(parts, block).reshape(len(own), -1, self._rank) + block[inside[own], None]
            found[own] += change.reshape(len(own), -1)
        return np.ascontiguousarray(found[:, columns])


MISS = Kind(
    RoleNames("MiSS", ("miss_block",), prefix="miss_"),
    _miss,
    fields=frozenset({"r", "mini_r", "init_weights", "miss_dropout", "bias"}),
)

# -- GraLoRA -----------------------------------------------------------------------------------------------------------


def _gralora(module: AdaptedModule) -> Iterator[Fold]:
    shape = module.shape("A")
    if len(shape) != 3:
        raise Misfit(f"{module.name} has gralora_A of the shape {list(shape)}, not one of blocks")
    count, width, rank = shape
    if count * width != module.columns or module.rows % count or rank % count:
        raise Misfit(f"{module.name} [{module.rows}, {module.columns}] does not fit {count} blocks at rank {rank}")
    a = module.tensor("A", shape)
    b = module.tensor("B", (count, rank, module.rows // count))
    hybrid = module.shape("A_general")[0] if module.has("A_general") else 0
    scale = np.float32(module.config.number("alpha", 64) / (rank + hybrid))
    general: tuple[Callable[[], F32], Callable[[], F32]] | None = None
    if hybrid:
        general = (
            module.tensor("B_general", (module.rows, hybrid)),
            module.tensor("A_general", (hybrid, module.columns)),
        )

    def factors() -> tuple[F32, F32]:
        """One product for each block of outputs and each block of inputs, which share the rank."""
        share = rank // count
        first, second = a().reshape(count, width, count, share), b().reshape(count, count, share, -1)
        left = np.zeros((count, module.rows // count, count, count, share), np.float32)
        right = np.zeros((count, count, share, count, width), np.float32)
        for out in range(count):
            for into in range(count):
                left[out, :, out, into] = second[out, into].T
                right[out, into, :, into] = first[into, :, out].T
        whole = left.reshape(module.rows, -1), right.reshape(-1, module.columns)
        if general is None:
            return whole[0] * scale, whole[1]
        joined = np.concatenate([whole[0], general[0]()], axis=1), np.concatenate([whole[1], general[1]()])
        return joined[0] * scale, joined[1]

    yield Fold(factors=factors)


GRALORA = Kind(
    RoleNames("GraLoRA", ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), prefix="gralora_"),
    _gralora,
    fields=frozenset({"r", "alpha", "gralora_k", "hybrid_r", "gralora_dropout", "init_weights", "bias"}),
)

# -- C3A ---------------------------------------------------------------------------------------------------------------


def _c3a(module: AdaptedModule) -> Iterator[Fold]:
    shape = module.shape("kernel")
    if len(shape) != 3 or (shape[0] * shape[2], shape[1] * shape[2]) != (module.rows, module.columns):
        raise Misfit(
            f"{module.name} [{module.rows}, {module.columns}] does not fit a kernel of the shape {list(shape)}"
        )
    kernel = module.tensor("kernel", shape)
    size = shape[2]

    def delta() -> Callable[[RowIndex, RowIndex], F32]:
        scaled = kernel() / np.float32(module.columns)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            """Each block is circulant: a row is the one before it, moved by one place."""
            out, k = np.divmod(np.arange(module.rows)[rows], size)
            into, j = np.divmod(np.arange(module.columns)[columns], size)
            found: F32 = scaled[out[:, None], into, (j - k[:, None]) % size]
            return found

        return read

    yield Fold(added(delta), changes_nothing=lambda: not kernel().any())


C3A = Kind(
    RoleNames("C3A", ("c3a_kernel",), prefix="c3a_"),
    _c3a,
    fields=frozenset({"block_size", "block_size_pattern", "init_weights", "bias"}),
)
