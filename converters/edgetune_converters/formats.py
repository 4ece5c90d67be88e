"""The formats that an export can write: one row each, with its storage types and how an output of it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgetune_converters.errors import EdgetuneError, RecipeError
from edgetune_converters.inputs import ExportInputs
from edgetune_converters.merging.score_head import classification_config
from edgetune_converters.names import FormatName
from edgetune_converters.outputs import lora, safetensors
from edgetune_converters.outputs.base import Output
from edgetune_converters.outputs.gguf import GgufOutput
from edgetune_converters.provenance import metadata
from edgetune_converters.quantization import recipes
from edgetune_converters.reading.gguf_base import GgufBase
from edgetune_converters.reading.gguf_companions import check_config, check_rope
from edgetune_converters.request import Target
from edgetune_converters.tokenizers.special import SpecialTokenIds, special_token_ids

if TYPE_CHECKING:
    from edgetune_converters.outputs.traced import Tracer


class Format(NamedTuple):
    """A row of FORMATS."""

    types: tuple[str, ...]
    """Storage types, by the names that the user gives."""
    check_type: Callable[[str], object]
    """Raises RecipeError for a storage type that the format does not have."""
    check_path: Callable[[Path], None]
    """Raises EdgetuneError for a path that cannot be written."""
    make: Callable[[ExportInputs, str, Path], Output]
    """Makes the output of a storage type; nothing is written yet."""
    default_type: str
    """Storage type where none of `types` is named."""
    is_directory: bool = False
    """Whether an artifact is a directory."""


def _gguf(inputs: ExportInputs, type_name: str, path: Path) -> Output:
    request, model = inputs.request, inputs.model
    plan = inputs.plan(type_name)
    stated = inputs.general | metadata.size_keys(model, request.name) | metadata.hyperparameter_keys(model)
    return GgufOutput(
        plan,
        model.tensors,
        path,
        stated | metadata.plain_keys(inputs.prefix_key("gguf")) | inputs.vocabulary.current.metadata,
        overrides=tuple(request.overrides.texts),
        importance=inputs.importance,
        measure_survival=request.measure_survival,
        split_max_size=request.split_max_size,
    )


def _safetensors(inputs: ExportInputs, type_name: str, path: Path) -> Output:
    model = inputs.model
    inputs.prefix("safetensors")
    if isinstance(model.checkpoint, GgufBase):
        check_config(model.checkpoint)
    kind, max_shard, companions = safetensors.check_type(type_name), inputs.request.max_shard_size, inputs.companions
    if model.score_head is not None:
        config = classification_config(companions.config, model.score_head)
        companions = companions._replace(config=config, pad_token=model.score_head.pad_token)
    return safetensors.SafetensorsOutput(path, kind, model.of_directory, companions, max_shard)


def _lora(inputs: ExportInputs, type_name: str, path: Path) -> Output:
    inputs.prefix("gguf-lora")
    made = lora.lora_factors_of_model(
        inputs.model, lora.LoraRank(inputs.request.lora_rank, inputs.request.lora_max_error)
    )
    return lora.LoraOutput(path, lora.check_type(type_name), made, inputs.general)


def _onnx(inputs: ExportInputs, type_name: str, path: Path) -> Output:
    from edgetune_converters.onnx import model as onnx_model
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, check_fallback, onnx_recipe
    from edgetune_converters.outputs.onnx import OnnxOutput

    request, model = inputs.request, inputs.model
    if isinstance(model.checkpoint, GgufBase):
        check_rope(model.checkpoint)
    companions = inputs.companions
    extra = {key: str(value) for key, value in request.metadata.items()} | inputs.prefix_key("onnx")
    ends = special_token_ids(companions.tokenizer, model.config.raw, companions.chat_template, model.config.vocab_size)
    if request.tracer is not None and not model.family.onnx:
        return _traced(inputs, type_name, path, request.tracer, ends, extra)
    found = onnx_model.source_tensors(model.tensors)
    decoder = onnx_model.describe_model(model.family, model.config, found)
    head = None if model.score_head is None else model.score_head.weight
    graph = onnx_model.DecoderGraph.of(
        decoder, found, onnx_recipe(type_name), request.onnx_settings or DEFAULT_SETTINGS, head
    )
    if not request.allow_fallback:
        check_fallback(graph.plan)
    return OnnxOutput(path, graph, model.in_hf_row_order, companions, inputs.provenance, ends, inputs.importance, extra)


def _traced(
    inputs: ExportInputs,
    type_name: str,
    path: Path,
    tracer: Tracer,
    ends: SpecialTokenIds,
    extra: Mapping[str, str],
) -> Output:
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS
    from edgetune_converters.onnx.traced_model import TracedSettings
    from edgetune_converters.onnx.traced_weights import slots_by_name
    from edgetune_converters.outputs.traced import TracedOutput

    request, model = inputs.request, inputs.model
    if isinstance(model.checkpoint, GgufBase):
        raise RecipeError(
            f"{model.checkpoint.path} is a GGUF file: {tracer.name} cannot trace it",
            "Give a model directory with --base",
        )
    settings = TracedSettings(
        type_name.lower(), request.onnx_settings or DEFAULT_SETTINGS, slots_by_name(model.bound), request.allow_fallback
    )
    return TracedOutput(path, tracer, model, inputs.companions, inputs.provenance, ends, settings, extra)


def _check_onnx_type(name: str) -> object:
    from edgetune_converters.onnx.plan import onnx_recipe

    return onnx_recipe(name)


def _check_onnx_path(path: Path) -> None:
    from edgetune_converters.outputs.onnx import check_replaceable

    check_replaceable(path)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise EdgetuneError(f"{path} is a directory", "Give the path of the file to be written")


# onnx is imported only where it is needed: that takes longer than importing all of this package
FORMATS: Mapping[FormatName, Format] = {
    "gguf": Format((*recipes.RECIPES, *recipes.ALIASES), recipes.recipe_named, _check_file, _gguf, "q4_k_m"),
    "safetensors": Format(
        safetensors.TYPES, safetensors.check_type, safetensors.check_replaceable, _safetensors, safetensors.BASE_TYPE,
        is_directory=True,
    ),
    "gguf-lora": Format(lora.TYPES, lora.check_type, _check_file, _lora, "f32"),
    "onnx": Format(
        ("int4", "int8", "f16", "f32"), _check_onnx_type, _check_onnx_path, _onnx, "int4", is_directory=True
    ),
}  # fmt: skip


def check(targets: Sequence[Target]) -> None:
    """Raise EdgetuneError for storage types and paths that no output can have."""
    if not targets:
        raise RecipeError("no storage type was given", f"Known: {', '.join(recipes.RECIPES)}")
    resolved = [target.path.resolve() for target in targets]
    for path in resolved:
        if resolved.count(path) > 1:
            raise EdgetuneError(f"two outputs would be written to {path}", "Give each type its own path")
    for target in targets:
        format_ = FORMATS[target.format]
        format_.check_path(target.path)
        format_.check_type(target.type)


def make(inputs: ExportInputs) -> list[Output]:
    """Make the outputs of the request. Nothing is written yet."""
    for target in inputs.request.targets:
        inputs.model.check_format(target.format)
    return [FORMATS[target.format].make(inputs, target.type, target.path) for target in inputs.request.targets]
