"""DeLoRA: factors of unit length, scaled by the norms of the base's columns. BEFT: an added bias.

Sources: PEFT, tuners/delora/layer.py, tuners/beft/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import F32

_SHORTEST = 1e-4  # shorter rows and columns are divided by this length


def _delora(module: AdaptedModule) -> Iterator[Fold]:
    rank = module.shape("A")[0]
    a, b = module.tensor("A", (rank, module.columns)), module.tensor("B", (module.rows, rank))
    strength, norms = module.tensor("lambda", (1,)), module.tensor("w_norm", (module.columns,))

    def factors() -> tuple[F32, F32]:
        right, left = a(), b()
        lengths = _lengths(right, 1) * _lengths(left, 0)
        scale = (float(strength().reshape(-1)[0]) / rank / lengths).astype(np.float32)
        return left * scale, right * norms().reshape(1, -1)

    yield Fold(factors=factors)


def _lengths(values: F32, axis: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.maximum(np.sqrt(np.square(values, dtype=np.float64).sum(axis)), _SHORTEST)
    return found


DELORA = Kind(
    RoleNames("DeLoRA", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), prefix="delora_"),
    _delora,
    fields=frozenset(
        {"r", "delora_lambda", "rank_pattern", "lambda_pattern", "module_dropout", "init_weights", "bias"}
    ),
)


def _beft(module: AdaptedModule) -> Iterator[Fold]:
    bias = module.tensor("bias", (1, module.rows), (module.rows,))
    if not module.has_bias:
        raise Misfit(f"{module.name} has a bias of BEFT, and the base has no bias there")
    yield Fold(factors=lambda: (bias().reshape(-1, 1), np.ones((1, 1), np.float32)), part="bias")


BEFT = Kind(RoleNames("BEFT", ("beft_bias",), prefix="beft_"), _beft, fields=frozenset({"init_weights"}))
