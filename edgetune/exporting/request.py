"""The one place in which a source and its options become a request to the converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.exporting.importance import matrix_path
from edgetune.exporting.options import flag_name
from edgetune.planning.export_checks import byte_count
from edgetune.reference.golden import is_golden
from edgetune_converters.adapters.combine_methods import COMBINE_METHODS, CombineMethod
from edgetune_converters.gguf import keys
from edgetune_converters.names import AUTO, ORIGINAL

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune.exporting.source import Source
    from edgetune_converters.adapters.combined import Combination
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.request import ExportRequest, Target


def export_request(
    source: Source, config: ExportConfig, targets: Sequence[Target] = (), threads: int = 0
) -> ExportRequest:
    """Return the request for an export. Merge base `auto` becomes `original` until it is measured.

    Args:
        source: The model.
        config: The options.
        targets: The artifacts; none for a request from which variants are made.
        threads: Worker threads; 0 takes all cores.

    Raises:
        ConfigError: A size cannot be read.
        RecipeError: A storage type set for single tensors cannot be used.
    """
    from edgetune_converters.quantization.overrides import overrides_of
    from edgetune_converters.request import ExportRequest

    return ExportRequest(
        base=source.base,
        targets=tuple(targets),
        adapter=source.adapter,
        combination=_combination(source, config),
        score_head=source.score_head,
        prompt_task=prompt_task(source, config),
        tokenizer=source.tokenizer,
        name=source.name,
        merge_base=ORIGINAL if config.merge_base == AUTO else config.merge_base,
        bnb_record=source.bnb_record,
        overrides=overrides_of(config.tensor_types, config.output_tensor_type, config.token_embedding_type),
        imatrix=matrix_path(source, config, targets),
        allow_fallback=config.allow_fallback,
        onnx_settings=_onnx_settings(config) if any(target.format == "onnx" for target in targets) else None,
        split_max_size=_byte_count(config, "split_max_size"),
        max_shard_size=_byte_count(config, "max_shard_size"),
        lora_rank=config.lora_rank,
        lora_max_error=config.lora_max_error,
        measure_survival=config.survival,
        metadata=_metadata(source, config),
        expected_base=source.expected_base,
        expected_adapter=source.expected_adapter,
        threads=threads,
    )


def prompt_task(source: Source, config: ExportConfig) -> int | None:
    """Return the number of the task whose prompt is exported; None where none is stated and the adapter has one.

    A run is exported with the prompt of the task that its reference was captured with, unless another one is stated.

    Raises:
        ConfigError: The adapter has no task of this name.
    """
    wanted, names = config.prompt_task, source.tasks
    if isinstance(wanted, str):
        if wanted not in names:
            known = f"they are {', '.join(names)}" if names else "it was trained without names of tasks"
            raise ConfigError(
                f"{flag_name('prompt_task')}: the adapter has no task {wanted!r}; {known}",
                "Name one of them, or give its number, from 0 on",
            )
        return names.index(wanted)
    return source.captured_task if wanted is None else wanted


def _metadata(source: Source, config: ExportConfig) -> Mapping[str, str]:
    """Return the metadata of the run; of another task than the captured one, without the answers of that one."""
    task, captured = prompt_task(source, config), source.captured_task
    if captured is None or task is None:
        return source.metadata
    kept = {key: text for key, text in source.metadata.items() if task == captured or not is_golden(key)}
    return {**kept, keys.PROMPT_TASK: str(task)}


def warn_of_other_task(source: Source, config: ExportConfig) -> None:
    """Warn that a file with the prompt of another task than the captured one cannot be validated."""
    task, captured, names = prompt_task(source, config), source.captured_task, source.tasks
    if captured is None or task is None or task == captured or task >= len(names):
        return
    console.warn(
        f"the file holds the prompt of the task {names[task]!r}, and the reference of the run was captured with that "
        f"of {names[captured]!r}: `edgetune validate` and `edgetune verify` cannot compare it; train a run with "
        f"export.prompt_task: {names[task]} to measure it"
    )


def _combination(source: Source, config: ExportConfig) -> Combination | None:
    """Return how the adapters of the source are combined; None for one without a weight. Raises ConfigError."""
    paths = () if source.adapter is None else (source.adapter, *source.further_adapters)
    weights = tuple(config.adapter_weights)
    method = COMBINE_METHODS[config.combine]
    combined = len(paths) > 1 or bool(weights)
    checks = {
        "there is no adapter to weight: give --adapter for each --adapter-weight": weights and not paths,
        f"{len(paths)} adapters and {len(weights)} weights were given: give --adapter-weight for each --adapter": (
            paths and combined and len(paths) != len(weights)
        ),
        "the adapter of a run is exported as it was trained: give --base and --adapter RUN/adapter to weight it": (
            source.run is not None and weights
        ),
        "every --adapter-weight is 0, and the file would equal the base: leave out the adapters": (
            weights and not any(weights)
        ),
        f"--combine {config.combine} combines several adapters: give two at least with --adapter": (
            config.combine != "linear" and len(paths) < 2
        ),
        f"--combine {config.combine} prunes values: give --density, the share that is kept, such as 0.5": (
            method.prunes and config.density is None
        ),
        f"--density is for {_names(lambda each: each.prunes)}: leave it out, or give one of them with --combine": (
            config.density is not None and not method.prunes
        ),
        f"--combine-seed is for {_names(lambda each: each.at_random)}: leave it out": (
            config.combine_seed is not None and not method.at_random
        ),
        f"--combine-rank is for {_names(lambda each: each.lowers_rank)}: leave it out": (
            config.combine_rank is not None and not method.lowers_rank
        ),
    }  # fmt: skip
    problems = [text for text, wrong in checks.items() if wrong]
    if problems:
        raise ConfigError("the adapters cannot be combined so: " + "; ".join(problems), _COMBINE_HINT)
    if not combined:
        return None
    from edgetune_converters.adapters.combined import Combination

    density, seed = config.density or 1.0, config.combine_seed or 0
    return Combination(paths, weights, config.combine, density, seed, config.combine_rank)


def _names(wanted: Callable[[CombineMethod], bool]) -> str:
    *names, last = [name for name, method in COMBINE_METHODS.items() if wanted(method)]
    return f"{', '.join(names)} and {last}"


_COMBINE_HINT = "For example: --adapter a --adapter b --adapter-weight 0.7 --adapter-weight 0.3"


def _onnx_settings(config: ExportConfig) -> OnnxSettings:
    from edgetune_converters.onnx.plan import OnnxSettings

    return OnnxSettings(config.block_size, config.symmetric, config.portable)


def _byte_count(config: ExportConfig, field: str) -> int | None:
    text = getattr(config, field)
    return None if text is None else byte_count(text, flag_name(field))


_BY_HAND = ("tensor_types", "output_tensor_type", "token_embedding_type")


def check_overrides(config: ExportConfig, targets: Sequence[Target], given: Mapping[str, Any]) -> None:
    """Warn that storage types of single tensors apply to GGUF alone.

    Raises:
        ConfigError: They are in `given`, and no GGUF file is written.
    """
    options = " and ".join(flag_name(field) for field in _BY_HAND if getattr(config, field))
    others = sorted({target.path.name for target in targets if target.format != "gguf"})
    if not options or not others:
        return
    if len(others) == len({target.path.name for target in targets}) and any(given.get(field) for field in _BY_HAND):
        raise ConfigError(
            f"{options} can set the types of a GGUF file alone, and no GGUF file is written",
            "Leave it out, or add --format gguf. In ONNX, --block-size sets the blocks and --search-types chooses them",
        )
    console.warn(f"{options} can set the types of GGUF files alone and changes nothing in {', '.join(others)}")


def _has(format_: str, *types: str) -> Callable[[Sequence[Target]], bool]:
    """Return whether one of the targets is of a format and, where they are given, of one of the types."""
    return lambda targets: any(
        target.format == format_ and (not types or target.type in types) for target in targets
    )  # fmt: skip


_GGUF = ("a GGUF file", "--format gguf", _has("gguf"))
_BLOCKS = ("int4 or int8 in ONNX", "--format onnx -q int4", _has("onnx", "int4", "int8"))
# field -> what it applies to, how to export that, and whether the targets have it
_APPLIES_TO: Mapping[str, tuple[str, str, Callable[[Sequence[Target]], bool]]] = {
    "block_size": _BLOCKS,
    "symmetric": _BLOCKS,
    "portable": ("ONNX", "--format onnx", _has("onnx")),
    "max_shard_size": ("a safetensors directory", "--format safetensors", _has("safetensors")),
    "lora_rank": ("a GGUF adapter", "--format gguf-lora", _has("gguf-lora")),
    "split_max_size": _GGUF,
    "modelfile": _GGUF,
}


def check_used(targets: Sequence[Target], given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a given option that applies to no target. The run's configuration may have such options."""
    for field, (what, how, applies) in _APPLIES_TO.items():
        if given.get(field) and not applies(targets):
            raise ConfigError(
                f"{flag_name(field)} is for {what} alone, and none is exported", f"Leave it out, or add {how}"
            )
