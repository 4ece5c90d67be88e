"""Kinds whose change is made of the base's own weights: HiRA, RoAd, GLoRA, DEFT, PEANuT.

Sources: PEFT, tuners/hira/layer.py, tuners/road/layer.py, tuners/glora/layer.py, tuners/deft/layer.py,
tuners/peanut/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.once import Once
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.products import (
    columns_combined,
    is_zero_product,
    matrix_product,
    product,
    rows_combined,
)
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.errors import AdapterError, OnlyPeftError
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

Pair = Callable[[], tuple[F32, F32]]


# -- HiRA --------------------------------------------------------------------------------------------------------------


def _hira(module: AdaptedModule) -> Iterator[Fold]:
    if module.has("embedding_A"):  # an embedding [rows, width] is treated as its transpose
        rank = module.shape("embedding_A")[0]
        a = module.tensor("embedding_A", (rank, module.rows))
        b = module.tensor("embedding_B", (module.columns, rank))
        factors: Pair = lambda: (np.ascontiguousarray(a().T), np.ascontiguousarray(b().T))  # noqa: E731
    else:
        rank = module.shape("A")[0]
        right = module.tensor("A", (rank, module.columns))
        left = module.tensor("B", (module.rows, rank))
        factors = lambda: (left(), right())  # noqa: E731

    def apply(base: Read, trained: Read) -> Read:
        first, second = factors()

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            own = widened(base(rows, columns))
            return own + own * product(first, second, rows, columns)

        return read

    yield Fold(apply, changes_nothing=lambda: is_zero_product(*factors()))


HIRA = Kind(
    RoleNames("HiRA", ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), prefix="hira_"),
    _hira,
    fields=frozenset({"r", "rank_pattern", "hira_dropout", "init_weights"}),
)

# -- RoAd --------------------------------------------------------------------------------------------------------------

# variant -> angles and scales per output
_ROAD_SIZES: Mapping[str, float] = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def _road(module: AdaptedModule) -> Iterator[Fold]:
    variant = module.config.raw.get("variant", "road_1")
    group = module.config.integer("group_size", 64)
    if variant not in _ROAD_SIZES:
        raise Misfit(f"the variant of RoAd is {variant!r}, not one of {', '.join(_ROAD_SIZES)}")
    if group < 2 or group % 2 or module.rows % group:
        raise Misfit(f"{module.name} has {module.rows} outputs, which groups of {group} do not divide into halves")
    size = int(module.rows * _ROAD_SIZES[variant])
    angles, scales = module.tensor("theta", (size,)), module.tensor("alpha", (size,))

    def rotation() -> tuple[F32, F32]:
        """Return the factor of each output itself, and that of its partner in the other half of the group."""
        theta, alpha = angles().astype(np.float64), scales()
        if variant == "road_4":
            by_half = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
            cosine, sine = np.cos(by_half[0][:, 0]), np.sin(by_half[0][:, 1])
            own, other = by_half[1][:, 0] * cosine, by_half[1][:, 1] * sine
        else:
            repeat = 2 if variant == "road_1" else 1
            angle, scale = (np.repeat(each.reshape(-1, group // 2), repeat, axis=0) for each in (theta, alpha))
            own, other = scale * np.cos(angle), scale * np.sin(angle)
        signs = np.where(np.arange(module.rows) % group < group // 2, -1, 1)
        return own.reshape(-1).astype(np.float32), (other.reshape(-1) * signs).astype(np.float32)

    def apply(base: Read, trained: Read) -> Read:
        own, other = rotation()
        numbers = np.arange(module.rows)
        partner = np.where(numbers % group < group // 2, numbers + group // 2, numbers - group // 2)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            first, second = widened(base(rows, columns)), widened(base(partner[rows], columns))
            return first * own[rows, None] + second * other[rows, None]

        return read

    def changes_nothing() -> bool:
        own, other = rotation()
        return bool((own == 1).all() and not other.any())

    yield Fold(apply, changes_nothing=changes_nothing)
    if module.has_bias:
        yield Fold(apply, part="bias", changes_nothing=changes_nothing)


ROAD = Kind(
    RoleNames("RoAd", ("road_theta", "road_alpha"), prefix="road_"),
    _road,
    fields=frozenset({"variant", "group_size", "init_weights"}),
)

# -- GLoRA -------------------------------------------------------------------------------------------------------------


def _glora_path(module: AdaptedModule, name: str, rows: int, columns: int) -> Callable[[RowIndex, RowIndex], F32]:
    """Return a reader of one of the matrices A to E [rows, columns]: factors, a column, one number or nothing."""
    if module.has(f"{name}.Xd"):
        rank = module.shape(f"{name}.Xu")[0]
        left, right = module.tensor(f"{name}.Xd", (rows, rank)), module.tensor(f"{name}.Xu", (rank, columns))
        return lambda of_rows, of_columns: product(left(), right(), of_rows, of_columns)
    if module.has(f"{name}.X"):
        values = module.tensor(f"{name}.X", (rows, 1), (rows,), (1,))
        return lambda of_rows, of_columns: np.broadcast_to(values().reshape(-1, 1), (rows, columns))[of_rows][
            :, of_columns
        ]
    empty = module.tensor(f"{name}.zeros") if module.has(f"{name}.zeros") else None
    if empty is not None and empty().any():
        raise Misfit(f"{module.name} has {name}.zeros that are not zero")
    return lambda of_rows, of_columns: np.zeros((rows, columns), np.float32)[of_rows][:, of_columns]


def _glora(module: AdaptedModule) -> Iterator[Fold]:
    scale, shift = (_glora_path(module, name, module.rows, module.columns) for name in "AB")
    from_weight = _glora_path(module, "C", module.columns, 1)
    bias_scale, bias_shift = (_glora_path(module, name, module.rows, 1) for name in "DE")
    yield _scaled_and_shifted(scale, shift, "weight")
    if not module.has_bias:
        return
    if not from_weight(ALL, ALL).any():
        yield _scaled_and_shifted(bias_scale, bias_shift, "bias")
        return
    weight = module.weight
    if weight is None:
        raise Misfit(f"{module.name} changes its bias by its weight (config_C), which is not there")

    def shifted(rows: RowIndex, columns: RowIndex) -> F32:
        """The bias E + W C, as a column."""
        numbers = np.arange(module.rows)[rows] if isinstance(rows, slice) else rows
        return bias_shift(rows, columns) + columns_combined(weight(), from_weight(ALL, ALL), numbers)[:, columns]

    yield _scaled_and_shifted(bias_scale, shifted, "bias", idle=False)


def _scaled_and_shifted(scale: Read, shift: Read, part: str, *, idle: bool | None = None) -> Fold:
    def apply(base: Read, trained: Read) -> Read:
        def read(rows: RowIndex, columns: RowIndex) -> F32:
            own = widened(base(rows, columns))
            changed: F32 = own + own * scale(rows, columns) + shift(rows, columns)
            return changed

        return read

    return Fold(
        apply,
        part="bias" if part == "bias" else "weight",
        changes_nothing=lambda: not scale(ALL, ALL).any() and not shift(ALL, ALL).any() if idle is None else idle,
    )


GLORA = Kind(
    RoleNames(
        "GLoRA",
        tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
        prefix="glora_",
    ),
    _glora,
    fields=frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights", "bias"}),
)

# -- DEFT --------------------------------------------------------------------------------------------------------------


def _deft(module: AdaptedModule) -> Iterator[Fold]:
    rank = module.shape("P")[1]
    directions = module.tensor("P", (module.rows, rank))
    removal = module.config.flag("para")
    injection = None if removal else module.tensor("R", (rank, module.columns))
    alpha = module.config.raw.get("alpha")
    scale = np.float32(1.0 if not alpha else module.config.number("alpha") / rank)
    orthogonal = module.config.raw.get("decomposition_method", "relu") == "qr"

    def apply(base: Read, trained: Read) -> Read:
        stored = directions()
        basis = np.linalg.qr(stored)[0] if orthogonal else stored
        right = basis if orthogonal else np.maximum(stored, 0)

        def inner() -> F32:
            removed = rows_combined(np.ascontiguousarray(right.T), base)
            return -removed if injection is None else injection() * scale - removed

        inside = Once(inner)
        return lambda rows, columns: widened(base(rows, columns)) + product(basis, inside(), rows, columns)

    yield Fold(apply, changes_nothing=lambda: not directions().any())


def _check_deft(config: PeftConfig) -> None:
    method = config.raw.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise AdapterError(f"{config.path}: decomposition_method is {method!r}, not relu or qr", MERGE_FIRST)


DEFT = Kind(
    RoleNames("DEFT", ("deft_P", "deft_R"), prefix="deft_"),
    _deft,
    fields=frozenset(
        {"r", "alpha", "para", "decomposition_method", "init_scale", "deft_dropout", "init_weights", "bias"}
    ),
    check=_check_deft,
)

# -- PEANuT ------------------------------------------------------------------------------------------------------------


def _sigmoid(values: F32) -> F32:
    found: F32 = (1 / (1 + np.exp(-values.astype(np.float64)))).astype(np.float32)
    return found


# name of transformers -> the function
_ACTIVATIONS: Mapping[str, Callable[[F32], F32]] = {
    "relu": lambda values: np.maximum(values, 0),
    "relu6": lambda values: np.clip(values, 0, 6),
    "leaky_relu": lambda values: np.where(values >= 0, values, values * np.float32(0.01)),
    "sigmoid": _sigmoid,
    "silu": lambda values: values * _sigmoid(values),
    "swish": lambda values: values * _sigmoid(values),
    "tanh": lambda values: np.tanh(values.astype(np.float64)).astype(np.float32),
    "linear": lambda values: values,
}


def _peanut(module: AdaptedModule) -> Iterator[Fold]:
    """The change of a column of W is a small network of it: B f(... f(A w))."""
    rank, depth = module.shape("A")[0], module.config.integer("depth", 0)
    first, last = module.tensor("A", (rank, module.rows)), module.tensor("B", (module.rows, rank))
    down = [module.tensor(f"encoders.{number}", (rank, rank)) for number in range(depth)]
    up = [module.tensor(f"decoders.{number}", (rank, rank)) for number in range(depth)]
    active = _ACTIVATIONS[module.config.raw.get("act_fn", "relu")]
    scale = np.float32(module.config.number("scaling", 1.0))

    def apply(base: Read, trained: Read) -> Read:
        def inner() -> F32:
            hidden = active(rows_combined(first(), trained))
            kept = []
            for weight in down:
                kept.append(hidden)
                hidden = active(matrix_product(weight(), hidden))
            for weight in up:
                hidden = active(matrix_product(weight(), hidden)) + kept.pop()
            return hidden

        inside, outer = Once(inner), last() * scale
        return lambda rows, columns: widened(base(rows, columns)) + product(outer, inside(), rows, columns)

    yield Fold(apply, changes_nothing=lambda: not last().any(), needs_trained=True)


def _check_peanut(config: PeftConfig) -> None:
    name = config.raw.get("act_fn", "relu")
    if name not in _ACTIVATIONS:
        raise OnlyPeftError(
            f"the adapter uses the activation {name!r}; those that can be merged are {', '.join(_ACTIVATIONS)}",
            MERGE_FIRST,
        )


PEANUT = Kind(
    RoleNames("PEANuT", ("peanut_A", "peanut_B"), prefix="peanut_", numbered=("peanut_encoders", "peanut_decoders")),
    _peanut,
    fields=frozenset({"r", "depth", "act_fn", "scaling", "init_weights"}),
    check=_check_peanut,
)
