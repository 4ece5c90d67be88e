"""What outputs without a recipe would hold: a safetensors directory, and a GGUF adapter. Only headers are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.names import ORIGINAL
from edgetune_converters.outputs import lora, safetensors
from edgetune_converters.quantization.recipes import PlannedTensor, Recipe, StoragePlan

if TYPE_CHECKING:
    from edgetune_converters.onnx.plan import OnnxSettings


def plan_safetensors(base: Path, types: Sequence[str], *, adapter: Path | None = None) -> list[StoragePlan]:
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


def plan_traced(
    base: Path, types: Sequence[str], settings: OnnxSettings, *, adapter: Path | None = None
) -> list[StoragePlan]:
    """What a graph drawn by transformers' exporter would hold, one plan for each type: embeddings are looked up,
    matrices are multiplied with, and of a stack of experts each token takes its own."""
    from edgetune_converters.onnx import traced_weights
    from edgetune_converters.onnx.plan import onnx_recipe

    model = open_model(base, adapter, merge_base_named(ORIGINAL))
    slot_of = traced_weights.slots_by_name(model.bound)
    plans = []
    for wanted in (onnx_recipe(name) for name in types):
        rows = []
        for tensor in model.in_base_order:
            slot = slot_of(tensor.name)
            embedding = slot is not None and slot[0].endswith("embedding")
            looked_up = embedding or len(tensor.shape) > 2
            manner = traced_weights.WeightUsage(not looked_up or (embedding and model.tied), looked_up)
            storage, meant = traced_weights.choose_storage(tensor.name, tensor.shape, manner, wanted, settings, slot)
            size = sum(spec.bytes for spec in storage.specs(tensor.shape))
            why = "as the traced graph is expected to use it"
            dtype = tensor.source.dtype.lower()
            rows.append(PlannedTensor(tensor.name, tensor.shape, dtype, storage.name, meant.name, why, size))
        plans.append(_plan(wanted.name, rows))
    return plans


def plan_lora(base: Path, types: Sequence[str], *, adapter: Path | None = None) -> list[StoragePlan]:
    """One plan for each type; of a pair A is the adapter's own and B holds the scale. Reads the adapter."""
    chosen = [lora.check_type(name) for name in types]
    factors = lora.lora_factors_of_model(open_model(base, adapter, merge_base_named(ORIGINAL)))
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


def _plan(title: str, rows: Sequence[PlannedTensor]) -> StoragePlan:
    return StoragePlan(Recipe(title, 0, title), tuple(rows))


def _row(name: str, shape: tuple[int, ...], source: str, kind: str, why: str) -> PlannedTensor:
    return PlannedTensor(name, shape, source, kind, kind, why, math.prod(shape) * BY_NAME[kind].bytes)
