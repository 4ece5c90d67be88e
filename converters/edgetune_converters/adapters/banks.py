"""Kinds whose factors are made of tensors that all modules share: RandLoRA, PVeRA, VB-LoRA, UniLoRA.

Sources: PEFT, tuners/randlora/layer.py, tuners/pvera/layer.py, tuners/vblora/layer.py and model.py, tuners/unilora.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.errors import AdapterError, OnlyPeftError
from edgetune_converters.tensors import F32

_NOT_SAVED = "the random projections were not saved (save_projection is false), and follow from a generator of torch"


def _check_projection(config: PeftConfig) -> None:
    if not config.flag("save_projection", default=True):
        raise OnlyPeftError(f"the adapter can be merged by PEFT alone: {_NOT_SAVED}", MERGE_FIRST)


def _projection(module: AdaptedModule, role: str, least: tuple[int, ...]) -> Callable[[], F32]:
    """Return the reader of a shared tensor, of which a part is used: `least` is its smallest shape."""
    if not module.has(role):
        raise Misfit(f"{module.name} has no {role}: {_NOT_SAVED}")
    shape = module.shape(role)
    if len(shape) != len(least) or any(size < part for size, part in zip(shape, least, strict=True)):
        raise Misfit(f"{role} has the shape {list(shape)}, and {module.name} needs {list(least)}")
    return module.tensor(role, shape)


# -- RandLoRA ----------------------------------------------------------------------------------------------------------


def _randlora(module: AdaptedModule) -> Iterator[Fold]:
    small, large = sorted((module.rows, module.columns))
    rank, bases = module.shape("lambda")
    weights = module.tensor("lambda", (rank, bases)), module.tensor("gamma", (bases, small))
    a = _projection(module, "A", (rank, 1, small))
    b = _projection(module, "B", (large, bases, rank))
    scale = np.float32(module.config.number("randlora_alpha", 640) / rank)

    def factors() -> tuple[F32, F32]:
        per_basis, per_column = (read() for read in weights)
        inner = a()[:rank, :bases, :small] * per_basis[:, :, None] * per_column
        narrow = inner.reshape(rank * bases, small)
        wide = b()[:large, :bases, :rank].reshape(large, bases * rank) * scale
        if small == module.columns:
            return np.ascontiguousarray(wide), narrow
        return np.ascontiguousarray(narrow.T), np.ascontiguousarray(wide.T)

    yield Fold(factors=factors)


_RANDLORA_NAMES = ("randlora_A", "randlora_B")
RANDLORA = Kind(
    RoleNames("RandLoRA", ("randlora_lambda", "randlora_gamma", *_RANDLORA_NAMES), _RANDLORA_NAMES, prefix="randlora_"),
    _randlora,
    fields=frozenset(
        {
            *("r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
            *("randlora_dropout", "init_weights", "bias"),
        }
    ),
    check=_check_projection,
)

# -- PVeRA -------------------------------------------------------------------------------------------------------------


def _pvera(module: AdaptedModule) -> Iterator[Fold]:
    """The mean of the sampled changes, which is what PEFT merges."""
    (twice,) = module.shape("lambda_d")
    rank = twice // 2
    inner, outer = module.tensor("lambda_d", (2 * rank,)), module.tensor("lambda_b", (module.rows,))
    a, b = _projection(module, "A", (2 * rank, module.columns)), _projection(module, "B", (module.rows, rank))

    def factors() -> tuple[F32, F32]:
        left = b()[: module.rows, :rank] * outer().reshape(-1, 1)
        return left, a()[:rank, : module.columns] * inner().reshape(-1, 1)[:rank]

    yield Fold(factors=factors)


_PVERA_NAMES = ("pvera_A", "pvera_B")
PVERA = Kind(
    RoleNames("PVeRA", ("pvera_lambda_b", "pvera_lambda_d", *_PVERA_NAMES), _PVERA_NAMES, prefix="pvera_"),
    _pvera,
    fields=frozenset(
        {
            *("r", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial", "init_weights", "bias"),
            *("sample_at_inference", "generator_seed"),
        }
    ),
    check=_check_projection,
)

# -- VB-LoRA -----------------------------------------------------------------------------------------------------------


def _vblora(module: AdaptedModule) -> Iterator[Fold]:
    if not module.has("vector_bank"):
        raise Misfit(f"{module.name} has no vblora_vector_bank")
    count, length = module.shape("vector_bank")
    if module.rows % length or module.columns % length:
        raise Misfit(f"{module.name} [{module.rows}, {module.columns}] does not divide into vectors of {length}")
    bank = module.tensor("vector_bank", (count, length))
    shape = module.shape("logits_A" if module.has("logits_A") else "logits_A_topk_indices")
    rank = shape[0]
    first = _mixture(module, "logits_A", (rank, module.columns // length), count, bank)
    second = _mixture(module, "logits_B", (module.rows // length, rank), count, bank)

    def factors() -> tuple[F32, F32]:
        left = second().transpose(0, 2, 1).reshape(module.rows, rank)
        return np.ascontiguousarray(left), first().reshape(rank, module.columns)

    yield Fold(factors=factors)


def _mixture(
    module: AdaptedModule, role: str, shape: tuple[int, int], count: int, bank: Callable[[], F32]
) -> Callable[[], F32]:
    """Return a reader of weighted sums of vectors of the bank, [*shape, length]."""
    best = module.config.integer("topk", 2)
    if not module.has(role):
        chosen = module.integers(f"{role}_topk_indices", (*shape, best))
        if best == 1:
            return lambda: bank()[chosen()[..., 0]]
        stored = module.tensor(f"{role}_topk_weights", (*shape, best - 1))

        def of_stored() -> F32:
            weights = np.concatenate([stored(), 1 - stored().sum(-1, keepdims=True)], axis=-1)
            return _weighted(bank(), chosen(), weights)

        return of_stored
    logits = module.tensor(role, (*shape, count))

    def of_logits() -> F32:
        values = logits().astype(np.float64)
        order = np.argsort(-values, axis=-1, kind="stable")
        descending = np.take_along_axis(values, order, -1)
        if np.any(descending[..., best - 1 : best] == descending[..., best : best + 1]):
            raise AdapterError(
                f"{module.name}: {role} holds equal logits, of which PEFT chooses some by chance: the vectors of the "
                "training are not known",
                "Save it again with save_only_topk_weights: true",
            )
        order, largest = order[..., :best], descending[..., :best]
        powers = np.exp(largest - largest[..., :1])
        return _weighted(bank(), order, powers / powers.sum(-1, keepdims=True))

    return of_logits


def _weighted(bank: F32, chosen: NDArray[np.int64], weights: NDArray[np.floating[Any]]) -> F32:
    found: F32 = (bank[chosen] * weights[..., None]).sum(-2).astype(np.float32)
    return found


_LOGITS = tuple(
    f"vblora_logits_{factor}{suffix}" for factor in "AB" for suffix in ("", "_topk_indices", "_topk_weights")
)
VBLORA = Kind(
    RoleNames(
        "VB-LoRA",
        _LOGITS,
        ("vblora_vector_bank",),
        prefix="vblora_",
        integers=("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"),
    ),
    _vblora,
    fields=frozenset(
        {
            *("r", "topk", "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout", "bias"),
            *("init_logits_std", "init_vector_bank_bound"),
        }
    ),
)

# -- UniLoRA -----------------------------------------------------------------------------------------------------------


def _unilora(module: AdaptedModule) -> Iterator[Fold]:
    (count,) = module.shape("theta_d")
    values = module.tensor("theta_d", (count,))
    rank = module.shape("indices_A")[0]
    a = _picked(module, "A", (rank, module.columns), values)
    b = _picked(module, "B", (module.rows, rank), values)
    yield Fold(factors=lambda: (b(), a()))


def _picked(module: AdaptedModule, factor: str, shape: tuple[int, int], values: Callable[[], F32]) -> Callable[[], F32]:
    """Return a reader of a factor: a value and a scale for each place."""
    places, scales = module.integers(f"indices_{factor}", shape), module.tensor(f"scales_{factor}", shape)
    return lambda: values().reshape(-1)[places()] * scales()


def _check_indices(config: PeftConfig) -> None:
    if not config.flag("save_indices"):
        raise OnlyPeftError(
            "the adapter can be merged by PEFT alone: which values belong to a layer was not saved (save_indices is "
            "false), and follows from the order of the layers in the model's class",
            MERGE_FIRST,
        )


UNILORA = Kind(
    RoleNames(
        "UniLoRA",
        tuple(f"unilora_{what}_{factor}" for what in ("indices", "scales") for factor in "AB"),
        ("unilora_theta_d",),
        prefix="unilora_",
        integers=("unilora_indices_A", "unilora_indices_B"),
    ),
    _unilora,
    fields=frozenset(
        {
            *("r", "theta_d_length", "proj_seed", "save_indices", "unilora_dropout", "init_weights", "bias"),
            "init_theta_d_bound",
        }
    ),
    check=_check_indices,
)
