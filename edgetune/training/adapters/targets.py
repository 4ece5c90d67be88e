"""Which layers of a base an adapter changes: presets, names, regular expressions and numbers of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from edgetune.errors import ConfigError
from edgetune.methods import Lora
from edgetune.methods.base import ALL_LINEAR, SLOTS_OF_PRESET, LayerMethod
from edgetune.planning.base_model import ExportableLayers
from edgetune.training.adapters.linear_layers import MATRICES, linear_layer_names, linear_layers

_LAYER = re.compile(r"\.(\d+)\.")
_WITH_EMBEDDINGS = (*MATRICES, torch.nn.Embedding)
_OF_EMBEDDINGS = ("lora", "hira", "oft")
"""The kinds whose adapters PEFT attaches to an embedding."""
Targets = str | list[str]


def resolve_targets(
    model: Any, method: LayerMethod, layers: ExportableLayers | None, *, whole_names: bool = False
) -> Targets:
    """Return `target_modules` for PEFT: as it is stated, or whole names if it is a preset or limited to some layers.

    `whole_names`: return whole names in any case.

    Raises:
        ConfigError: It fits no layer, or patterns and other options name layers that are not adapted.
    """
    excluded = layers.excluded if layers else None
    stated = method.target_modules
    preset = stated if isinstance(stated, str) and stated in SLOTS_OF_PRESET else None
    if isinstance(stated, list):
        _check_names(model, method, stated, excluded)
    names = _matching(model, method, layers)
    _check_outer_layers(model, method, names)
    if not names:
        raise ConfigError(
            f"adapter.target_modules: {stated!r} fits no layer",
            f"The linear layers are {', '.join(linear_layer_names(model, excluded))}",
        )
    if method.layers is not None:
        names = _in_layers(names, method.layers)
    _check_patterns(method, names)
    _check_named_layers(method, names)
    _check_saved_modules(model, method, names)
    _check_sizes(model, method, names)
    return names if preset or method.layers is not None or whole_names else stated


def _matching(model: Any, method: LayerMethod, layers: ExportableLayers | None) -> list[str]:
    """Return the whole names of the layers that `target_modules` fits, in the order of the model."""
    excluded, stated = layers.excluded if layers else None, method.target_modules
    head = model.get_output_embeddings()
    names = [name for name, module in linear_layers(model, excluded, MATRICES) if module is not head]
    if stated == ALL_LINEAR:
        return names
    if isinstance(stated, str):
        slots = SLOTS_OF_PRESET.get(stated)
        if slots is None:
            everything = [name for name, _ in linear_layers(model, excluded, _WITH_EMBEDDINGS)]
            return [name for name in everything if _full_match(stated, name)]
        found = {name: layers.slots_of(f"{name}.weight") if layers else frozenset() for name in names}
        return [name for name in names if found[name] & set(slots)]
    everything = [name for name, _ in linear_layers(model, excluded, _WITH_EMBEDDINGS)]
    return [name for name in everything if any(name == each or name.endswith("." + each) for each in stated)]


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"adapter.target_modules: {pattern!r} is no regular expression: {error}",
            f"Name layers in a list, or write {', '.join([ALL_LINEAR, *SLOTS_OF_PRESET])}",
        ) from None


def _in_layers(names: Sequence[str], wanted: Sequence[int]) -> list[str]:
    """Return the names of layers with these numbers. Raises ConfigError for a number without any."""
    numbers = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    absent = sorted(set(wanted) - set(numbers.values()))
    if absent:
        known = sorted(set(numbers.values()))
        what = f"are {known[0]} to {known[-1]}" if known else "have no numbers"
        raise ConfigError(
            f"adapter.layers: no adapted layer has the number {', '.join(map(str, absent))}",
            f"The numbers of the layers {what}",
        )
    return [name for name, number in numbers.items() if number in wanted]


def _check_patterns(method: LayerMethod, names: Sequence[str]) -> None:
    """Raise ConfigError for a key of a `..._pattern` option that fits no adapted layer."""
    for option in type(method).model_fields:
        if option.endswith("_pattern"):
            for key in getattr(method, option):
                if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                    raise ConfigError(
                        f"adapter.{option}: {key!r} fits no adapted layer",
                        f"Adapted layers end with {', '.join(_last_parts(names))}",
                    )


def _check_named_layers(method: LayerMethod, names: Sequence[str]) -> None:
    """Raise ConfigError for a stated name of a layer that is not adapted; defaults name layers of several families."""
    for option in method.options_naming_layers:
        stated = getattr(method, option)
        if stated == type(method).model_fields[option].default:
            continue
        unused = [each for each in stated if not any(f".{name}".endswith(f".{each}") for name in names)]
        if unused:
            raise ConfigError(
                f"adapter.{option}: {unused[0]!r} fits no adapted layer",
                f"Adapted layers end with {', '.join(_last_parts(names))}",
            )


def _check_saved_modules(model: Any, method: LayerMethod, adapted: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in method.modules_to_save:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            raise ConfigError(
                f"adapter.modules_to_save: {wanted!r} fits no module of the base",
                f"Its modules end with {', '.join(_last_parts(names)[:20])}",
            )
    saved = tuple(f".{each}." for each in method.modules_to_save)
    if saved and all(any(each in f".{name}." for each in saved) for name in adapted):
        raise ConfigError(
            f"adapter.modules_to_save trains all of adapter.target_modules in full, such as {adapted[0]}, which leaves "
            "none to adapt",
            "Leave them out of adapter.modules_to_save, or name other layers in adapter.target_modules",
        )


def _check_sizes(model: Any, method: LayerMethod, names: Sequence[str]) -> None:
    """Raise ConfigError for a layer whose size the options do not fit; PEFT finds some of them with weights alone."""
    modules = dict(model.named_modules())
    for name in names:
        rows, columns = (getattr(modules[name], side, None) for side in ("out_features", "in_features"))
        if rows and columns and (why := method.why_not_on(rows, columns)):
            raise ConfigError(
                f"adapter: {method.facts.title} does not fit {name} [{rows}, {columns}]: {why}",
                f"Change the options of adapter.kind: {method.kind}, or leave the layer out of adapter.target_modules",
            )


def _last_parts(names: Sequence[str]) -> list[str]:
    parts = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return [part for part in parts if not part.isdigit()]


def _check_names(model: Any, method: LayerMethod, stated: Sequence[str], excluded: str | None) -> None:
    names = [name for name, _ in linear_layers(model, excluded, _WITH_EMBEDDINGS)]
    known = linear_layer_names(model, excluded)
    unmatched = [each for each in stated if not any(name == each or name.endswith("." + each) for name in names)]
    if unmatched or not stated:
        quoted = ", ".join(map(repr, unmatched))
        fits = "fits" if len(unmatched) == 1 else "fit"
        what = f"{quoted} {fits} no linear layer" if unmatched else "the list is empty"
        raise ConfigError(f"adapter.target_modules: {what}", f"The layers are {', '.join(known)}; or write all-linear")


def _check_outer_layers(model: Any, method: LayerMethod, names: Sequence[str]) -> None:
    """Raise ConfigError if a method cannot adapt the embedding or the head, or a bias is absent."""
    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    without_bias = [name for name in names if method.kind == "beft" and getattr(modules[name], "bias", None) is None]
    if without_bias:
        raise ConfigError(
            f"adapter.kind: beft changes biases, and {without_bias[0]} of the base has none",
            "Use adapter.kind: bitfit, which adds biases that files can hold",
        )
    if head is not None and head in (modules[name] for name in names):
        _check_head(method, is_tied=head.weight is embedding.weight)
    for name in names:
        if modules[name] is embedding and method.kind not in _OF_EMBEDDINGS:
            others = ", ".join(_OF_EMBEDDINGS)
            raise ConfigError(
                f"adapter.target_modules: {method.facts.title} cannot adapt {name}, which {others} can",
                "Name it in adapter.modules_to_save, which trains it in full",
            )


def _check_head(method: LayerMethod, *, is_tied: bool) -> None:
    if is_tied and isinstance(method, Lora) and method.moves_base:
        raise ConfigError(
            f"adapter.init: {method.init} takes its first values out of the output matrix, which is the embedding too",
            "Leave the output matrix out of adapter.target_modules, or choose another adapter.init",
        )
