"""Variants of LoRA whose A or B is stored in another form, and starts that take a part of the base away.

QA-LoRA pools the inputs in groups, BD-LoRA stores the blocks of a block-diagonal A or B. PiSSA, OLoRA, CorDA and
LoRA-GA subtract the product of the first A and B from the base. Sources: PEFT, tuners/lora/variants.py, layer.py
(olora_init), model.py (subtract_mutated_init).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgetune_converters.adapters.change import Apply
from edgetune_converters.adapters.directory import INITIAL
from edgetune_converters.adapters.once import Once
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.products import product, rows_combined
from edgetune_converters.errors import AdapterError, OnlyPeftError
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

Factors = Callable[[], tuple[F32, F32]]
_FROM_TRAINING = "Take the file from the training again"


def _same(values: F32) -> F32:
    return values


@dataclass(frozen=True)
class Spelling:
    """How A [r, k] and B [n, r] follow from the stored tensors, and the shapes of these for those of A and B."""

    a: Callable[[F32], F32] = _same
    b: Callable[[F32], F32] = _same
    a_columns: int = 1
    """Columns of A for one stored column."""
    b_columns: int = 1

    def stored(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the stored tensors for those of A and B."""
        return (a[0], a[1] // self.a_columns), (b[0], b[1] // self.b_columns)


PLAIN = Spelling()


def spelling_of(config: PeftConfig, module: str, columns: int) -> Spelling:
    """Return how the pair of a linear layer with `columns` inputs is stored. Raises AdapterError."""
    if config.flag("use_qalora"):
        return _pooled(config, module, columns)
    blocks = config.raw.get("use_bdlora")
    return _block_diagonal(config, module, blocks) if blocks else PLAIN


def _pooled(config: PeftConfig, module: str, columns: int) -> Spelling:
    """Inputs are averaged in groups, and the averages multiplied by the number of groups."""
    size = config.integer("qalora_group_size", 16)
    if size < 1 or columns % size:
        raise AdapterError(
            f"{config.path}: qalora_group_size is {size}, which does not divide the {columns} inputs of {module}",
            "Was it trained on this base model?",
        )
    scale = np.float32(columns // size / size)
    return Spelling(a=lambda stored: np.repeat(stored, size, axis=1) * scale, a_columns=size)


def _block_diagonal(config: PeftConfig, module: str, stated: object) -> Spelling:
    if not isinstance(stated, Mapping):
        raise AdapterError(f"{config.path}: use_bdlora is {stated!r}, not an object", _FROM_TRAINING)
    count = stated.get("nblocks", 1)
    if type(count) is not int or count < 1:
        raise AdapterError(
            f"{config.path}: nblocks is {count!r}, not a natural number", "Take the file from the training"
        )
    name = module.rpartition(".")[2]
    in_a, in_b = (
        any(pattern in name for pattern in stated.get(f"target_modules_bd_{factor}") or ()) for factor in "ab"
    )

    def whole(stored: F32) -> F32:
        rows, columns = len(stored) // count, stored.shape[1]
        found = np.zeros((len(stored), columns * count), np.float32)
        for block in range(count):
            own = slice(block * rows, (block + 1) * rows)
            found[own, block * columns : (block + 1) * columns] = stored[own]
        return found

    if in_a:
        return Spelling(a=whole, a_columns=count)
    return Spelling(b=whole, b_columns=count) if in_b else PLAIN


# -- starts that move the base -----------------------------------------------------------------------------------------

# `init_lora_weights` -> whether the base stays as it is
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")


def start_of(config: PeftConfig) -> str | None:
    """Return the start that took a part of the base away; None for one that left the base as it is.

    Raises:
        AdapterError: The start cannot be undone with what the adapter holds.
    """
    stated = config.raw.get("init_lora_weights", True)
    if stated in _BASE_UNCHANGED:
        return None
    name = next((known for known in _SUBTRACTED if str(stated).lower().startswith(known)), None)
    found = name == "olora" or (config.path.parent / INITIAL).is_dir()
    if name is not None and found and not config.flag("use_dora"):
        return name
    kind = OnlyPeftError if stated == "pissa" else AdapterError  # PEFT decomposes the base again
    raise kind(
        f"the adapter was initialized with {stated!r}, which moves the base: it does not fit the original one",
        _CONVERT if name is None else f"{_CONVERT}; or put the adapter before training into {INITIAL}/ inside of it",
    )


_CONVERT = (
    "Convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...); where "
    "--base is the base that was saved after the initialization, set init_lora_weights to true in adapter_config.json"
)


def without_orthogonal_start(factors: Factors, rank: int, scale: float) -> Apply:
    """Return the transform of OLoRA: the start is found again in the base, with the QR decomposition.

    The first A and B are R and Q of rank r, so that their product is Q Q^T W, where Q spans the first r columns of W.
    """

    def apply(base: Read, trained: Read) -> Read:
        def start() -> tuple[F32, F32]:
            first = np.linalg.qr(widened(trained(ALL, slice(0, rank))).astype(np.float64))[0].astype(np.float32)
            return first * np.float32(-scale), rows_combined(np.ascontiguousarray(first.T), trained)

        left, right = factors()
        taken = Once(start)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            merged: F32 = widened(base(rows, columns)) + product(left, right, rows, columns)
            return merged + product(*taken(), rows, columns)

        return read

    return apply
