"""The tensors of an adapter by their meaning: A and B of a module, a replaced tensor, rows of an embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.reading.safetensors_file import row_count
from edgetune_converters.reading.wrapper_names import (
    inner_wrappers,
    missing_prefix,
    without_inner_wrappers,
    without_prefix,
)
from edgetune_converters.tensors import TensorInfo

_SHOWN_NAMES = 3  # of names with the same problem
_COMPARED_ROWS = 1024
_FLOATS = ("F32", "F16", "BF16", "F64")

_PREFIX = r"^(?:base_model\.model\.)?(?P<module>.+?)"
_ADAPTER_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
_FACTOR = re.compile(_PREFIX + rf"\.(?P<role>lora_(?:embedding_)?[AB]){_ADAPTER_NAME}(?:\.(?P<part>weight|bias))?$")
# tensors as they were before training: PEFT saves them along with an embedding
_ORIGINAL = re.compile(
    _PREFIX + r"\.(?:original_module\.(?P<part>weight|bias)|token_adapter\.trainable_tokens_original(?:\.[^.]+)?)$"
)
_TOKENS = re.compile(_PREFIX + r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_REPLACEMENT = re.compile(
    _PREFIX + r"(?:\.token_adapter)?(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<part>weight|bias)$"
)
_KINDS = (_ORIGINAL, _FACTOR, _TOKENS, _REPLACEMENT)  # in the order in which they are tried


@dataclass
class AdapterTensors:
    """The tensors of an adapter; modules and targets as the adapter spells them, without a wrapper's prefix."""

    factors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    """A and B by module and role."""
    replacements: dict[str, TensorInfo] = field(default_factory=dict)
    """New values of whole tensors, by target."""
    token_rows: dict[str, TensorInfo] = field(default_factory=dict)
    """New values of the rows of some tokens, by module."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tensors(file: AdapterWeights, fits: Callable[[str], bool]) -> AdapterTensors:
    """Return the tensors of an adapter by meaning; `fits` tells whether a module is one of the base."""
    found = AdapterTensors()
    matched = _matched(file, found)
    modules = _module_names(file, [match["module"] for _, match in matched], fits, found)
    doubles: list[str] = []
    for info, match in matched:
        module = modules[match["module"]]
        if match.re is _FACTOR:
            roles = found.factors.setdefault(module, {})
            role = match["role"].replace("lora_", "") + (".bias" if match["part"] == "bias" else "")
            found.problems += [f"{info.name} is duplicated under another name"] if role in roles else []
            roles[role] = info
            continue
        group, key = (
            (found.token_rows, module)
            if match.re is _TOKENS
            else (found.replacements, f"{module}.{match['part']}")
        )  # fmt: skip
        other = group.setdefault(key, info)
        if other is info:
            continue
        if _same_numbers(file, other, info):
            doubles.append(info.name)
        else:
            found.problems.append(
                f"{other.name} and {info.name} are one tensor with different numbers: the trained one is not known"
            )
    found.notes += as_one_line(doubles, "repeats another tensor; used once", "repeat others; used once", noun="tensors")
    return found


def _matched(file: AdapterWeights, found: AdapterTensors) -> list[tuple[TensorInfo, re.Match[str]]]:
    """Each tensor with the pattern of its name; problems and notes for the others go to `found`."""
    matched: list[tuple[TensorInfo, re.Match[str]]] = []
    foreign: list[str] = []
    originals: list[str] = []
    magnitudes: list[str] = []
    empty: list[str] = []
    integers: dict[str, list[str]] = {}
    for name, info in file.tensors.items():
        key = without_inner_wrappers(name)
        match = next((match for pattern in _KINDS if (match := pattern.match(key))), None)
        if "lora_magnitude_vector" in key:
            magnitudes.append(name)
        elif match is not None and match.re is _ORIGINAL:
            originals.append(name)
        elif info.dtype not in _FLOATS:
            integers.setdefault(info.dtype, []).append(name)
        elif 0 in info.shape:
            empty.append(name)
        elif match is None:
            foreign.append(name)
        else:
            matched.append((info, match))
    for dtype, names in integers.items():
        stored = f"stored as {dtype}, not as floats"
        found.problems += as_one_line(names, f"is {stored}", f"are {stored}", noun="tensors")
    lost = "empty: they were saved before DeepSpeed (ZeRO-3) or FSDP had gathered them"
    found.problems += as_one_line(empty, f"is {lost}", f"are {lost}", noun="tensors")
    dora = "a magnitude of DoRA, which cannot be merged yet"
    found.problems += as_one_line(magnitudes, f"is {dora}", f"are each {dora}")
    found.problems += as_one_line(foreign, "is not a tensor of a LoRA adapter", "are not tensors of a LoRA adapter")
    before = "the values before training; left out"
    found.notes += as_one_line(originals, f"holds {before}", f"hold {before}", noun="tensors")
    return matched


def _module_names(
    file: AdapterWeights, modules: Sequence[str], fits: Callable[[str], bool], found: AdapterTensors
) -> Mapping[str, str]:
    """The names of modules without a wrapper's prefix; a note for the prefix, a problem for each that fits twice."""
    missing = missing_prefix(modules, fits)
    if missing:
        found.notes.append(f"the adapter's keys lack {missing!r} in front, as those of a model without its head; added")
        return {module: missing + module for module in modules}
    choice = without_prefix(modules, fits)
    removed = [*inner_wrappers(file.tensors), *(prefix.rstrip(".") for prefix in choice.removed)]
    if removed:
        wrappers = " and ".join(repr(name) for name in removed)
        found.notes.append(f"the adapter's keys carry {wrappers}, the name of a wrapper around the model; ignored")
    found.problems += [
        f"{module} can be {' or '.join(names)} of the base model: its keys have no common prefix"
        for module, names in choice.ambiguous.items()
    ]
    return choice.names


def _same_numbers(file: AdapterWeights, one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape:
        return False
    count = row_count(one.shape)
    blocks = (slice(first, min(first + _COMPARED_ROWS, count)) for first in range(0, count, _COMPARED_ROWS))
    return all(np.array_equal(file.rows(one, block), file.rows(other, block), equal_nan=True) for block in blocks)


def as_one_line(names: Sequence[str], one: str, many: str, *, noun: str = "names") -> list[str]:
    """Return one line for all names of which the same is true, with the first of them."""
    if len(names) < 2:
        return [f"{name} {one}" for name in names]
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return [f"{len(names)} {noun} {many}: {', '.join(names[:_SHOWN_NAMES])}{more}"]
