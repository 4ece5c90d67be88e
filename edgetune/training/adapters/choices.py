"""Which tensors each selective method trains, checked against the model before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import ConfigError
from edgetune.methods.base import Method
from edgetune.methods.bitfit import BitFit
from edgetune.methods.freeze import Freeze
from edgetune.methods.full import Full
from edgetune.methods.llama_pro import LlamaPro
from edgetune.methods.selective import SelectiveMethod
from edgetune.planning.base_model import ExportableLayers
from edgetune.training.adapters import new_parts
from edgetune.training.adapters.checkpoint_layout import stored_names
from edgetune.training.adapters.selective import (
    BLOCKS,
    METHOD,
    TRAINED,
    ZERO,
    FullModel,
    Selection,
    SelectiveModel,
    select,
    stored_config,
)

_SHOWN = 3
Choice = Callable[[Any, Any, ExportableLayers | None, Sequence[str]], Selection]


def add_selective(
    model: Any, adapter: SelectiveMethod, layers: ExportableLayers | None = None, formats: Sequence[str] = ()
) -> Any:
    """Return the model, of which only the tensors that the method chooses are trained.

    Raises:
        ConfigError: The options name what the model does not have, or what cannot be exported in one of `formats`.
    """
    selection = _CHOICES[type(adapter)](model, adapter, layers, formats)
    return select(model, selection, _mixin(adapter.kind))


def load_selective(model: Any, directory: Path) -> Any:
    """Return the base with the trained tensors of a directory that a selective method wrote."""
    stated = stored_config(directory)
    kind = stated[METHOD]
    options = {key: value for key, value in stated.items() if key not in ("peft_type", METHOD, ZERO, TRAINED)}
    if BLOCKS in stated:
        new_parts.insert_blocks(model, stated[BLOCKS])
    names = stated[TRAINED]
    new_parts.add_biases(model, [name for name in names if name not in dict(model.named_parameters())])
    selection = Selection.of(model, kind, names, zero=stated.get(ZERO, ()), options=options)
    model = select(model, selection, _mixin(kind))
    model.load_trained(directory)
    for parameter in selection.parameters.values():
        parameter.requires_grad_(False)
    return model


def _mixin(kind: str) -> type[SelectiveModel]:
    return FullModel if kind == Full.model_fields["kind"].default else SelectiveModel


# -- full fine-tuning --------------------------------------------------------------------------------------------------


def _choose_all(model: Any, adapter: Full, layers: ExportableLayers | None, formats: Sequence[str]) -> Selection:
    names = [name for name, _ in model.named_parameters() if not (layers and layers.is_beside_text(name))]
    return Selection.of(model, adapter.kind, names, options={})


# -- some blocks -------------------------------------------------------------------------------------------------------


def _choose_blocks(model: Any, adapter: Freeze, layers: ExportableLayers | None, formats: Sequence[str]) -> Selection:
    prefix, blocks = new_parts.find_blocks(model)
    numbers = adapter.numbers(len(blocks))
    problems = []
    if absent := [number for number in numbers if not 0 <= number < len(blocks)]:
        what = f"names the block {absent[0]}" if isinstance(adapter.layers, list) else f"is {adapter.layers}"
        problems.append(f"adapter.layers {what}, and the base has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    names = [
        name
        for number in numbers
        if 0 <= number < len(blocks)
        for name in _parts(f"{prefix}.{number}", blocks[number], adapter.modules)
    ]
    if isinstance(adapter.modules, list):
        known = {f".{name}." for name, _ in blocks[0].named_parameters()}
        unmatched = [each for each in adapter.modules if not any(f".{each}." in name for name in known)]
        if unmatched or not adapter.modules:
            parts = dict.fromkeys(name.removesuffix(".weight") for name, _ in blocks[0].named_parameters())
            what = f"{', '.join(map(repr, unmatched))} fits no part of a block" if unmatched else "the list is empty"
            problems.append(f"adapter.modules: {what}; the parts are {', '.join(parts)}")
    if problems:
        raise ConfigError.of_many("problems in adapter", problems, "Correct the options of adapter.kind: freeze")
    names += [name for part in adapter.also for name in _outside(model, prefix, part)]
    _check_exported(model, adapter, names, layers)
    return Selection.of(model, adapter.kind, dict.fromkeys(names), options=adapter.stored_options())


def _parts(prefix: str, block: Any, modules: str | list[str]) -> list[str]:
    """Return the names of the parameters of a block that `modules` names."""
    names = [name for name, _ in block.named_parameters()]
    if isinstance(modules, list):
        names = [name for name in names if any(f".{each}." in f".{name}." for each in modules)]
    return [f"{prefix}.{name}" for name in names]


def _outside(model: Any, prefix: str, part: str) -> list[str]:
    """Return the names of the parameters of the embedding, of the last norm or of the head."""
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    if part in ends:
        chosen = {id(parameter) for parameter in ends[part].parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    blocks = prefix.rpartition(".")[0] + "."
    within = [name for name, _ in model.named_parameters() if name.startswith(blocks) and not name.startswith(prefix)]
    return [name for name in within if "norm" in name or ".ln_" in name]


# -- biases ------------------------------------------------------------------------------------------------------------


def _choose_biases(model: Any, adapter: BitFit, layers: ExportableLayers | None, formats: Sequence[str]) -> Selection:
    excluded = layers.excluded if layers else None
    found = [name for name, _ in model.named_parameters() if name.endswith(".bias") and _is_exported(name, layers)]
    added: list[str] = []
    if adapter.added_to != "none" and (adapter.added_to != "auto" or not found):
        candidates = new_parts.layers_without_bias(model, excluded)
        reasons = {name: layers.why_no_bias(name, formats) if layers else None for name in candidates}
        added = (
            [name for name, reason in reasons.items() if reason is None]
            if adapter.added_to == "auto"
            else _named_layers(adapter.added_to, reasons, new_parts.linear_names(model, excluded))
        )
        if not added and adapter.added_to == "auto":
            raise ConfigError(
                f"adapter.kind bitfit: the base has no biases, and none can be added: {next(iter(reasons.values()))}",
                "Choose other export.formats, or another method such as adapter.kind: layernorm",
            )
    if not found and not added:
        raise ConfigError("adapter.added_to is none, and the base has no biases to train", "Leave out adapter.added_to")
    new = [f"{name}.bias" for name in added]
    new_parts.add_biases(model, new)
    return Selection.of(model, adapter.kind, [*found, *new], zero=new, options=adapter.stored_options())


def _named_layers(wanted: Sequence[str], reasons: Mapping[str, str | None], linear: Sequence[str]) -> list[str]:
    """Return the layers without a bias that are named. Raises ConfigError for all that fit none, or have no place."""

    def fits(name: str, each: str) -> bool:
        return name == each or name.endswith("." + each)

    problems = [
        f"adapter.added_to: {each!r} fits no linear layer"
        for each in wanted
        if not any(fits(name, each) for name in linear)
    ]
    chosen = {name: reason for name, reason in reasons.items() if any(fits(name, each) for each in wanted)}
    problems += dict.fromkeys(f"adapter.added_to: {reason}" for reason in chosen.values() if reason)
    if problems:
        known = dict.fromkeys(name.rpartition(".")[2] for name, reason in reasons.items() if reason is None)
        hint = f"Layers that can get a bias are {', '.join(known)}" if known else "Set adapter.added_to: none"
        raise ConfigError.of_many("problems in adapter", problems, hint)
    return list(chosen)


# -- new blocks --------------------------------------------------------------------------------------------------------


def _insert_blocks(model: Any, adapter: LlamaPro, layers: ExportableLayers | None, formats: Sequence[str]) -> Selection:
    prefix, blocks = new_parts.find_blocks(model)
    count = len(blocks)
    if count % adapter.new_blocks:
        fitting = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        raise ConfigError(
            f"adapter.new_blocks {adapter.new_blocks} does not divide the {count} blocks of the base",
            f"Give one of {fitting}",
        )
    group = count // adapter.new_blocks
    sources = [
        number for first in range(0, count, group) for number in [*range(first, first + group), first + group - 1]
    ]
    if layers and (reason := layers.why_not_expanded(sources)):
        raise ConfigError(f"adapter.kind llama-pro: {reason}", "Choose another method, such as adapter.kind: freeze")
    last = f"{prefix}.{count - 1}"
    within = [name for name, _ in blocks[count - 1].named_parameters()]
    _check_exported(model, adapter, [f"{last}.{name}" for name in within], layers)
    outputs = {name for name in within if new_parts.is_output(model, f"{last}.{name}", layers)}
    new = new_parts.insert_blocks(model, sources)
    names = [f"{prefix}.{number}.{name}" for number, block in new.items() for name, _ in block.named_parameters()]
    zero = [name for name in names if name.removeprefix(prefix).split(".", 2)[2] in outputs]
    selection = Selection.of(
        model, adapter.kind, names, zero=zero, options={**adapter.stored_options(), BLOCKS: sources}
    )  # fmt: skip
    for name in zero:
        selection.parameters[name].data.zero_()
    return selection


# -- checks ------------------------------------------------------------------------------------------------------------


def _is_exported(name: str, layers: ExportableLayers | None) -> bool:
    return layers is None or layers.has(name)


def _check_exported(model: Any, adapter: Method, names: Sequence[str], layers: ExportableLayers | None) -> None:
    """Raise ConfigError for tensors that the export would refuse after training."""
    stored = stored_names(model, names) if layers else []
    unknown = [name for name in stored if not _is_exported(name, layers)]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise ConfigError(
            f"adapter.kind {adapter.kind}: {', '.join(unknown[:_SHOWN])}{more} could not be exported after training",
            "Choose another method, such as adapter.kind: lora",
        )


_CHOICES: Mapping[type[Method], Choice] = {
    Full: _choose_all,
    Freeze: _choose_blocks,
    BitFit: _choose_biases,
    LlamaPro: _insert_blocks,
}
