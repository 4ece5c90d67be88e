"""VeRA: diag(b) @ B @ diag(d) @ A, with random A and B that all modules share.

Modules of other shapes use the first columns of A and the first rows of B. Source: PEFT, tuners/vera/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.errors import OnlyPeftError
from edgetune_converters.tensors import F32


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    rank = module.config.integer("r")
    a, b = module.tensor("vera_A"), module.tensor("vera_B")
    shapes = module.shape("vera_A"), module.shape("vera_B")
    wide = len(shapes[0]) == len(shapes[1]) == 2 and (shapes[0][0], shapes[1][1]) == (rank, rank)
    if not wide or shapes[0][1] < module.columns or shapes[1][0] < module.rows:
        raise Misfit(
            f"{module.name}: vera_A {list(shapes[0])} and vera_B {list(shapes[1])} do not cover "
            f"{[module.rows, module.columns]} at rank {rank}"
        )
    of_outputs = module.tensor("vera_lambda_b", (module.rows,))
    of_ranks = module.tensor("vera_lambda_d", (rank,))

    def factors() -> tuple[F32, F32]:
        left: F32 = of_outputs()[:, None] * b()[: module.rows]
        right: F32 = of_ranks()[:, None] * a()[:, : module.columns]
        return left, right

    yield Fold(factors=factors)


def _check(config: PeftConfig) -> None:
    if not config.flag("save_projection", default=True):
        raise OnlyPeftError(
            "the adapter does not hold the shared matrices of VeRA (save_projection is false), which only the random "
            f"numbers of PyTorch make again (projection_prng_key {config.raw.get('projection_prng_key')})",
            "Train with save_projection true, or merge it with PEFT first",
        )


VERA = Kind(
    RoleNames("VeRA", ("vera_lambda_b", "vera_lambda_d"), shared=("vera_A", "vera_B")),
    _fold,
    fields=frozenset(
        {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias", "init_weights"}
    ),
    check=_check,
)
