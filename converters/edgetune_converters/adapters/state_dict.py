"""The tensors of an adapter by their meaning: A and B of a module, a replaced tensor, rows of an embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
# rates answers while PPO trains; TRL saves it along with an adapter
_VALUE_HEAD = re.compile(r"^(?:.*\.)?v_head\.(?:.+\.)?(?:weight|bias)$")
# tensors as they were before training: PEFT saves them along with an embedding
_ORIGINAL = re.compile(
    _PREFIX + r"\.(?:original_module\.(?P<part>weight|bias)|(?:token_adapter\.)?trainable_tokens_original(?:\.[^.]+)?)$"
)
_TOKENS = re.compile(_PREFIX + r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")


@dataclass(frozen=True)
class RoleNames:
    """The names under which a kind of adapters stores its tensors."""

    title: str
    """The name of the method, for messages."""
    roles: tuple[str, ...] = ()
    """The tensors of a module, `MODULE.ROLE` or `MODULE.ROLE.weight`."""
    shared: tuple[str, ...] = ()
    """The tensors that all modules share."""
    prefix: str = ""
    """The beginning of the names in `roles` that is left out of the role."""
    replacing: tuple[str, ...] = ()
    """The names of modules that replace the one that they are in, as `modules_to_save` does."""
    integers: tuple[str, ...] = ()
    """The roles whose tensors hold integers."""
    may_be_empty: bool = False
    """Whether a module may have the rank 0."""
    numbered: tuple[str, ...] = ()
    """The tensors of a module of which there are several: `MODULE.ROLE.0.weight`, `MODULE.ROLE.1.weight`."""

    def role_of(self, name: str) -> re.Match[str] | None:
        """Match the name of a tensor of one module or of all: groups `module` (None for all), `role` and `part`."""
        match = self._of_all.match(name) if self.shared else None
        match = match or (self._numbered.match(name) if self.numbered else None)
        return match or (self._of_module.match(name) if self.roles else None)

    def replaced_by(self, name: str) -> re.Match[str] | None:
        """Match the name of the new value of a tensor of the base: groups `module` and `part`."""
        return self._replacement.match(name)

    @cached_property
    def _of_module(self) -> re.Pattern[str]:
        return re.compile(_PREFIX + rf"\.(?P<role>{_any(self.roles)}){_ADAPTER_NAME}(?:\.(?P<part>weight|bias))?$")

    @cached_property
    def _numbered(self) -> re.Pattern[str]:
        return re.compile(_PREFIX + rf"\.(?P<role>(?:{_any(self.numbered)})\.\d+)(?:\.(?P<part>weight))?$")

    @cached_property
    def _of_all(self) -> re.Pattern[str]:
        start = r"^(?:base_model\.)?(?:model\.)?(?P<module>)"
        return re.compile(start + rf"(?P<role>{_any(self.shared)}){_ADAPTER_NAME}(?:\.(?P<part>weight))?$")

    @cached_property
    def _replacement(self) -> re.Pattern[str]:
        names = _any(("modules_to_save", *self.replacing))
        wrapper = rf"(?:\.token_adapter)?(?:\.base_layer|\.(?:{names})(?:\.[^.]+)?)?"
        return re.compile(_PREFIX + wrapper + r"\.(?P<part>weight|bias)$")


def _any(names: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


@dataclass
class AdapterTensors:
    """The tensors of an adapter; modules and targets as the adapter spells them, without a wrapper's prefix."""

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    """The tensors of a method, such as A and B, by module and role."""
    shared: dict[str, TensorInfo] = field(default_factory=dict)
    """The tensors that all modules share, by role."""
    replacements: dict[str, TensorInfo] = field(default_factory=dict)
    """New values of whole tensors, by target."""
    token_rows: dict[str, TensorInfo] = field(default_factory=dict)
    """New values of the rows of some tokens, by module."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tensors(file: AdapterWeights, fits: Callable[[str], bool], names: RoleNames) -> AdapterTensors:
    """Return the tensors of an adapter by meaning.

    Args:
        file: The adapter's weights.
        fits: Tells whether a module is one of the base.
        names: The names of the tensors of this kind of adapters.
    """
    found = AdapterTensors()
    matched = _matched(file, found, names)
    spelled = [match["module"] for _, match, _ in matched if match["module"]]
    modules = _module_names(file, spelled, fits, found)
    doubles: list[str] = []
    for info, match, group in matched:
        module = modules[match["module"]] if match["module"] else ""
        if group == "role":
            roles = found.modules.setdefault(module, {}) if module else found.shared
            role = match["role"].removeprefix(names.prefix) + (".bias" if match["part"] == "bias" else "")
            found.problems += [f"{info.name} is duplicated under another name"] if role in roles else []
            roles[role] = info
            continue
        values, key = (
            (found.token_rows, module)
            if group == "tokens"
            else (found.replacements, f"{module}.{match['part']}")
        )  # fmt: skip
        other = values.setdefault(key, info)
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


def _matched(
    file: AdapterWeights, found: AdapterTensors, names: RoleNames
) -> list[tuple[TensorInfo, re.Match[str], str]]:
    """Each tensor with the match of its name and its group; problems and notes for the others go to `found`."""
    matched: list[tuple[TensorInfo, re.Match[str], str]] = []
    foreign: list[str] = []
    originals: list[str] = []
    value_head: list[str] = []
    empty: list[str] = []
    integers: dict[str, list[str]] = {}
    # in the order in which they are tried
    groups = (
        ("original", _ORIGINAL.match),
        ("value head", _VALUE_HEAD.match),
        ("role", names.role_of),
        ("tokens", _TOKENS.match),
        ("replacement", names.replaced_by),
    )
    for name, info in file.tensors.items():
        key = without_inner_wrappers(name)
        group, match = next(((group, match) for group, of in groups if (match := of(key))), ("", None))
        whole = group == "role" and match is not None and match["role"] in names.integers
        if group == "original":
            originals.append(name)
        elif group == "value head":
            value_head.append(name)
        elif info.dtype not in _FLOATS and not whole:
            integers.setdefault(info.dtype, []).append(name)
        elif 0 in info.shape and not (names.may_be_empty and group == "role"):
            empty.append(name)
        elif match is None:
            foreign.append(name)
        else:
            matched.append((info, match, group))
    for dtype, several in integers.items():
        stored = f"stored as {dtype}, not as floats"
        found.problems += as_one_line(several, f"is {stored}", f"are {stored}", noun="tensors")
    lost = "empty: they were saved before DeepSpeed (ZeRO-3) or FSDP had gathered them"
    found.problems += as_one_line(empty, f"is {lost}", f"are {lost}", noun="tensors")
    article = "an" if names.title[0] in "AEIO" else "a"
    one, many = (f"{words} of {article} {names.title} adapter" for words in ("is not a tensor", "are not tensors"))
    found.problems += as_one_line(foreign, one, many)
    of_ppo = "of the value head, which only PPO's training needs; left out"
    found.notes += as_one_line(value_head, f"is {of_ppo}", f"are {of_ppo}", noun="tensors")
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
