"""What outputs without a recipe would hold: a safetensors directory, and a GGUF adapter. Only headers are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.merge_base import ORIGINAL, merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.outputs import lora, safetensors
from edgetune_converters.recipes import Plan, Recipe, Row


def plan_safetensors(base: Path, types: Sequence[str], *, adapter: Path | None = None) -> list[Plan]:
    """One plan for each type, tensors under the names that they have in the base."""
    chosen = [safetensors.check_type(name) for name in types]
    model = open_model(base, adapter, merge_base_named(ORIGINAL))
    plans = []
    for wanted in chosen:
        rows = []
        for tensor in model.in_base_order:
            kind = safetensors.stored_as(tensor, wanted)
            why = "merged" if tensor.part.change else "as in the base"
            rows.append(_row(tensor.name, tensor.shape, tensor.source.dtype.lower(), kind, why))
        plans.append(_plan(f"safetensors, {wanted}", rows))
    return plans


def plan_lora(base: Path, types: Sequence[str], *, adapter: Path | None = None) -> list[Plan]:
    """One plan for each type; of a pair A is the adapter's own and B holds the scale. Reads the adapter."""
    chosen = [lora.check_type(name) for name in types]
    factors = lora.factors_of_model(open_model(base, adapter, merge_base_named(ORIGINAL)))
    return [
        _plan(
            f"gguf-lora, {kind}",
            [
                _row(item.name, item.values.shape, "adapter", kind, "A" if item.name.endswith("a") else "B, scaled")
                for item in factors
            ],
        )
        for kind in chosen
    ]


def _plan(title: str, rows: Sequence[Row]) -> Plan:
    return Plan(Recipe(title, 0, title), tuple(rows))


def _row(name: str, shape: tuple[int, ...], source: str, kind: str, why: str) -> Row:
    return Row(name, shape, source, kind, kind, why, math.prod(shape) * BY_NAME[kind].bytes)
