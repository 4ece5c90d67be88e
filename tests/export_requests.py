"""Export requests as tests write them: storage type -> path for each format, and the fields that matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_converters import exporting, planning
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.names import ORIGINAL, FormatName
from edgetune_converters.outputs.stream import Progress
from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.quantization.recipes import StoragePlan
from edgetune_converters.request import ExportRequest, Target

if TYPE_CHECKING:
    from edgetune_converters.onnx.plan import OnnxPlan, OnnxSettings

Paths = Mapping[str, Path]
NONE: Paths = {}


def targets(
    gguf: Paths = NONE, safetensors: Paths = NONE, lora: Paths = NONE, onnx: Paths = NONE
) -> tuple[Target, ...]:
    formats: dict[FormatName, Paths] = {"gguf": gguf, "safetensors": safetensors, "gguf-lora": lora, "onnx": onnx}
    return tuple(Target(format_, type_, path) for format_, paths in formats.items() for type_, path in paths.items())


def export(
    base: Path,
    gguf: Paths = NONE,
    *,
    safetensors: Paths = NONE,
    lora: Paths = NONE,
    onnx: Paths = NONE,
    progress: Progress | None = None,
    **fields: Any,
) -> list[Receipt]:
    """Export `base`; `fields` are those of ExportRequest."""
    return exporting.export(ExportRequest(base, targets(gguf, safetensors, lora, onnx), **fields), progress=progress)


def plan_gguf(base: Path, types: list[str], **fields: Any) -> list[StoragePlan]:
    found = targets(gguf={type_: Path(f"{type_}.gguf") for type_ in types})
    return planning.plan(ExportRequest(base, found, **fields))


def plan_onnx(base: Path, types: list[str], settings: OnnxSettings | None = None) -> list[OnnxPlan]:
    model = open_model(base, None, merge_base_named(ORIGINAL))
    return [planning.plan_onnx(model, type_, settings) for type_ in types]
