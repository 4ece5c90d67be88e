"""LoHa and LoKr: deltas that are an elementwise (Hadamard) or a Kronecker product of small matrices.

Source: PEFT, tuners/loha/layer.py and tuners/lokr/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.change import ReadDelta, added
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.products import is_zero_product, matrix_product, product
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import F32, RowIndex

_FIELDS = frozenset(
    {
        *("r", "alpha", "rank_pattern", "alpha_pattern", "init_weights"),
        *("rank_dropout", "module_dropout", "use_effective_conv2d"),
    }
)


def _fold_loha(module: AdaptedModule) -> Iterator[Fold]:
    """delta = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r."""
    rank, alpha = module.config.rank_and_alpha(module.name, "alpha")
    pairs = [
        (
            module.tensor(f"hada_w{number}_a", (module.rows, rank)),
            module.tensor(f"hada_w{number}_b", (rank, module.columns)),
        )
        for number in (1, 2)
    ]

    def delta() -> ReadDelta:
        (left, right), (other_left, other_right) = ((a(), b()) for a, b in pairs)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            one, other = product(left, right, rows, columns), product(other_left, other_right, rows, columns)
            return one * other * np.float32(alpha / rank)

        return read

    yield Fold(added(delta), changes_nothing=lambda: any(is_zero_product(a(), b()) for a, b in pairs))


def _fold_lokr(module: AdaptedModule) -> Iterator[Fold]:
    """delta = w1 (x) w2 * alpha / r; w1 and w2 are stored whole or as products of two matrices."""
    rank, alpha = module.config.rank_and_alpha(module.name, "alpha")
    (n1, k1), first = _kronecker_factor(module, "lokr_w1", rank)
    (n2, k2), second = _kronecker_factor(module, "lokr_w2", rank)
    if (n1 * n2, k1 * k2) != (module.rows, module.columns):
        raise Misfit(
            f"{module.name}: lokr_w1 {[n1, k1]} and lokr_w2 {[n2, k2]} do not make {[module.rows, module.columns]}"
        )

    def delta() -> ReadDelta:
        w1, w2 = first(), second()

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            row1, row2 = np.divmod(np.arange(module.rows)[rows], n2)
            column1, column2 = np.divmod(np.arange(module.columns)[columns], k2)
            values: F32 = w1[np.ix_(row1, column1)]
            values *= w2[np.ix_(row2, column2)]
            values *= np.float32(alpha / rank)
            return values

        return read

    yield Fold(added(delta), changes_nothing=lambda: not (first().any() and second().any()))


def _kronecker_factor(module: AdaptedModule, role: str, rank: int) -> tuple[tuple[int, int], Callable[[], F32]]:
    """The shape of a factor, and a function that reads it."""
    if module.has(role):
        shape = module.shape(role)
        if len(shape) != 2:
            raise Misfit(f"{module.name}: {role} has {len(shape)} axes, and that of a linear layer two")
        return (shape[0], shape[1]), module.tensor(role)
    if not (module.has(f"{role}_a") or module.has(f"{role}_b")):
        raise Misfit(f"{module.name} has no {role}")
    rows, columns = module.shape(f"{role}_a")[0], module.shape(f"{role}_b")[-1]
    a, b = module.tensor(f"{role}_a", (rows, rank)), module.tensor(f"{role}_b", (rank, columns))
    return (rows, columns), lambda: matrix_product(a(), b())


LOHA = Kind(RoleNames("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")), _fold_loha, fields=_FIELDS)
LOKR = Kind(
    RoleNames("LoKr", ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    _fold_lokr,
    fields=_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
)
