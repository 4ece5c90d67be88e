"""Plans: the storage type and size of every tensor, known before any weight is read. Only headers are read."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_converters import formats
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.inputs import TokenizerSource, open_request
from edgetune_converters.merging.score_head import ScoreTensor
from edgetune_converters.model import Model
from edgetune_converters.names import FormatName
from edgetune_converters.outputs import lora, safetensors
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.recipes import PlannedTensor, Recipe, StoragePlan
from edgetune_converters.request import ExportRequest

if TYPE_CHECKING:
    from edgetune_converters.onnx.plan import OnnxPlan, OnnxSettings


def plan(request: ExportRequest) -> list[StoragePlan]:
    """Return what `export` would write for each target, in order.

    An export whose fallback is too large is planned all the same. Of an ONNX family without a description, the plan is
    that of the graph that transformers' exporter draws.

    Raises:
        EdgetuneError: The base, the adapter or a storage type cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        return _plans(_open(request, Path(folder)), request)


def plan_with_notes(request: ExportRequest) -> tuple[list[StoragePlan], list[str]]:
    """Return the plans, and the notes on base, adapter and tokenizer that the receipts of an export begin with.

    The tokenizer is read too, and for GGUF converted, but not verified.

    Raises:
        EdgetuneError: As `plan`; TokenizerError when the tokenizer cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        model = _open(request, Path(folder))
        plans, notes = _plans(model, request), list(model.input_notes)
        source = TokenizerSource(request, model, Path(folder))
        if any(target.format != "gguf-lora" for target in request.targets):
            notes += source.notes
        if any(target.format == "gguf" for target in request.targets):
            notes += (source.of_file() or source.conversion().likely).notes
    return plans, notes


def _open(request: ExportRequest, rebuilt: Path) -> Model:
    for target in request.targets:
        formats.FORMATS[target.format].check_type(target.type)
    return open_request(request, rebuilt)


def _plans(model: Model, request: ExportRequest) -> list[StoragePlan]:
    for target in request.targets:
        model.check_format(target.format)
    return [PLANNERS[target.format](model, target.type, request) for target in request.targets]


def plan_onnx(model: Model, type_: str, settings: OnnxSettings | None = None) -> OnnxPlan:
    """Plan the graph of a family that has a description. Raises ArchitectureError for another one."""
    from edgetune_converters.onnx import model as onnx_model
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, onnx_recipe

    found = onnx_model.source_tensors(model.tensors)
    decoder = onnx_model.describe_model(model.family, model.config, found)
    head = None if model.score_head is None else model.score_head.weight
    return onnx_model.DecoderGraph.of(decoder, found, onnx_recipe(type_), settings or DEFAULT_SETTINGS, head).plan


def plan_traced(model: Model, type_: str, settings: OnnxSettings | None = None) -> StoragePlan:
    """Plan a graph that transformers' exporter draws, as it is expected to use its weights: embeddings are looked up,
    matrices are multiplied with, and of a stack of experts each token gathers its own."""
    from edgetune_converters.onnx import traced_weights
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, onnx_recipe

    types = onnx_recipe(type_)
    slot_of = traced_weights.slots_by_name(model.bound)
    rows = []
    for tensor in model.in_base_order:
        slot = slot_of(tensor.name)
        embedding = slot is not None and slot[0].endswith("embedding")
        looked_up = embedding or len(tensor.shape) > 2
        usage = traced_weights.WeightUsage(not looked_up or (embedding and model.tied), looked_up)
        storage, meant = traced_weights.choose_storage(
            tensor.name, tensor.shape, usage, types, settings or DEFAULT_SETTINGS, slot
        )
        size = sum(spec.bytes for spec in storage.specs(tensor.shape))
        why = "as the traced graph is expected to use it"
        dtype = tensor.source.dtype.lower()
        rows.append(PlannedTensor(tensor.name, tensor.shape, dtype, storage.name, meant.name, why, size))
    return _titled(types.name, rows)


def _plan_gguf(model: Model, type_: str, request: ExportRequest) -> StoragePlan:
    recipe, measured = recipes.recipe_named(type_), request.imatrix is not None
    return recipes.plan_storage(recipe, model.tensor_facts, model.facts, request.overrides, measured)


def _plan_safetensors(model: Model, type_: str, request: ExportRequest) -> StoragePlan:
    wanted = safetensors.check_type(type_)
    rows = []
    for tensor in model.of_directory:
        kind = safetensors.stored_as(tensor, wanted)
        if isinstance(tensor, ScoreTensor):
            rows.append(_row(tensor.name, tensor.shape, "run", kind, "the score head"))
            continue
        why = "merged" if tensor.part.change else "as in the base"
        rows.append(_row(tensor.name, tensor.shape, tensor.source.dtype.lower(), kind, why))
    return _titled(f"safetensors, {wanted}", rows)


def _plan_lora(model: Model, type_: str, request: ExportRequest) -> StoragePlan:
    """Plan the pairs of an adapter: A is the adapter's own, B holds the scale. Reads the adapter."""
    kind = lora.check_type(type_)
    rows = [
        _row(item.name, item.values.shape, "adapter", kind, "A" if item.name.endswith("a") else "B, scaled")
        for item in lora.lora_factors_of_model(model, lora.LoraRank(request.lora_rank, request.lora_max_error)).factors
    ]
    return _titled(f"gguf-lora, {kind}", rows)


def _plan_onnx(model: Model, type_: str, request: ExportRequest) -> StoragePlan:
    planner = plan_onnx if model.family.onnx else plan_traced
    return planner(model, type_, request.onnx_settings)


PLANNERS: Mapping[FormatName, Callable[[Model, str, ExportRequest], StoragePlan]] = {
    "gguf": _plan_gguf,
    "safetensors": _plan_safetensors,
    "gguf-lora": _plan_lora,
    "onnx": _plan_onnx,
}


def _titled(title: str, rows: Sequence[PlannedTensor]) -> StoragePlan:
    return StoragePlan(Recipe(title, 0, title), tuple(rows))


def _row(name: str, shape: tuple[int, ...], source: str, kind: str, why: str) -> PlannedTensor:
    return PlannedTensor(name, shape, source, kind, kind, why, math.prod(shape) * BY_NAME[kind].bytes)
