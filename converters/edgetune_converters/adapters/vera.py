"""VeRA: diag(b) @ B @ diag(d) @ A, with random A and B that all modules share.

Modules of other shapes use the first columns of A and the first rows of B. Where the adapter does not hold A and B,
PEFT draws them again with the seed `projection_prng_key`. Source: PEFT, tuners/vera/layer.py and model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.adapters.torch_random import uniform
from edgetune_converters.tensors import F32


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    rank = module.config.integer("r")
    a, b = _projections(module, rank)
    of_outputs = module.tensor("vera_lambda_b", (module.rows,))
    of_ranks = module.tensor("vera_lambda_d", (rank,))

    def factors() -> tuple[F32, F32]:
        left: F32 = of_outputs()[:, None] * b()[: module.rows]
        right: F32 = of_ranks()[:, None] * a()[:, : module.columns]
        return left, right

    yield Fold(factors=factors)


def _projections(module: AdaptedModule, rank: int) -> tuple[Callable[[], F32], Callable[[], F32]]:
    """Return the readers of A and B: of those that the adapter holds, or of those that PEFT draws again."""
    if not module.config.flag("save_projection", default=True):
        widest = module.widest()
        if widest is None:
            raise Misfit(
                f"{module.name}: the shared matrices of VeRA were not saved (save_projection is false), and they "
                "cannot be drawn again, because the shapes of other modules are not known"
            )
        seed = module.config.integer("projection_prng_key", 0)
        return (lambda: _drawn(widest, rank, seed)[0]), (lambda: _drawn(widest, rank, seed)[1])
    a, b = module.tensor("vera_A"), module.tensor("vera_B")
    shapes = module.shape("vera_A"), module.shape("vera_B")
    wide = len(shapes[0]) == len(shapes[1]) == 2 and (shapes[0][0], shapes[1][1]) == (rank, rank)
    if not wide or shapes[0][1] < module.columns or shapes[1][0] < module.rows:
        raise Misfit(
            f"{module.name}: vera_A {list(shapes[0])} and vera_B {list(shapes[1])} do not cover "
            f"{[module.rows, module.columns]} at rank {rank}"
        )
    return a, b


@lru_cache(maxsize=2)
def _drawn(widest: tuple[int, int], rank: int, seed: int) -> tuple[F32, F32]:
    """A [r, inputs] and B [outputs, r] of the widest module, uniform in the bounds of Kaiming's initialization."""
    outputs, inputs = widest
    bounds = [math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for fan in (inputs, rank)]
    a, b = uniform([(rank, inputs), (outputs, rank)], bounds, seed)
    return a, b


VERA = Kind(
    RoleNames("VeRA", ("vera_lambda_b", "vera_lambda_d"), shared=("vera_A", "vera_B")),
    _fold,
    fields=frozenset(
        {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias", "init_weights"}
    ),
)
