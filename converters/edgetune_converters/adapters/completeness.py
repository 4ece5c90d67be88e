"""Modules that adapter_config.json says are adapted, and of which the file of the adapter has no tensors.

The rules are those of PEFT: `target_modules` as names or as a pattern, `exclude_modules`, `layers_to_transform`,
`layers_pattern` and `modules_to_save`. Where they do not fit the modules that are there, nothing is concluded: an
adapter may have been saved from a wrapped model, whose modules have other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from edgetune_converters.adapters.base_targets import BaseTargets

_LAYER = re.compile(r"(?P<before>.*?\.)(?P<number>\d+)(?P<after>\..+)")


def is_adapted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module, by the fields of adapter_config.json."""
    targets = config.get("target_modules")
    if not targets or _is_excluded(config, module):
        return False
    if isinstance(targets, str):
        return _full_match(targets, module)
    if module in targets:
        return True
    return any(module.endswith(f".{name}") for name in targets) and _is_in_layers(config, module)


def _is_excluded(config: Mapping[str, Any], module: str) -> bool:
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if _full_match(excluded, module):
            return True
    elif any(module == name or module.endswith(f".{name}") for name in excluded):
        return True
    return any(_full_match(rf"(?:|.*\.){name}(?:|\..*)", module) for name in config.get("modules_to_save") or ())


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    stated = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){name}" for name in ([stated] if isinstance(stated, str) else stated)]
    found = (re.match(rf"{pattern}\.(\d+)\.", module) for pattern in patterns or [r".*?\.[^.]*"])
    number = next((int(match[1]) for match in found if match), None)
    return number is not None and (number == layers if isinstance(layers, int) else number in layers)


def _full_match(pattern: str, text: str) -> bool:
    try:
        return re.fullmatch(pattern, text) is not None
    except re.error:
        return False


def lost_modules(config: Mapping[str, Any], present: Collection[str], base: BaseTargets) -> list[str]:
    """Return the modules that are adapted and of which there are no tensors, in the order of their names.

    Args:
        config: adapter_config.json.
        present: The modules whose tensors are there, as the adapter spells them.
        base: The base.
    """
    shapes = {module: len(shape) for module in present if (shape := _shape(module, base)) is not None}
    if not shapes or not all(is_adapted(config, module) for module in shapes):
        return []
    candidates = {*_in_other_layers(shapes, base)}
    if all(base.renamed(f"{module}.weight") == f"{module}.weight" for module in shapes):
        candidates |= {name.removesuffix(".weight") for name in base.shapes if name.endswith(".weight")}
    dimensions = set(shapes.values())
    return sorted(
        module
        for module in candidates - set(present)
        if (shape := _shape(module, base)) is not None and len(shape) in dimensions and is_adapted(config, module)
    )


def _shape(module: str, base: BaseTargets) -> tuple[int, ...] | None:
    """Return the shape of the weight of a module; None for another name, and for experts, which may be stored apart."""
    shape = base.shapes.get(base.renamed(f"{module}.weight"))
    is_expert = base.renamed(module) in base.experts or ".experts." in module
    return None if shape is None or is_expert or len(shape) > 2 else shape


def _in_other_layers(present: Collection[str], base: BaseTargets) -> Iterator[str]:
    """Yield the names of the same modules in every layer of the base."""
    numbers = {int(match["number"]) for name in base.shapes if (match := _LAYER.fullmatch(name))}
    places = {(match["before"], match["after"]) for module in present if (match := _LAYER.fullmatch(module))}
    for before, after in places:
        yield from (f"{before}{number}{after}" for number in numbers)
