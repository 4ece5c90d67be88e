"""adapter_config.json of PEFT: the kind of an adapter, and the values that the fold of each module needs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edgetune_converters.adapters.mlx import as_peft_config, is_mlx
from edgetune_converters.errors import AdapterError
from edgetune_converters.files.contents import read_json

CONFIG_FILE = "adapter_config.json"
FULL_CONFIG_FILE = "edgetune_adapter.json"
"""Stands in its place beside a whole model, where transformers would take an adapter_config.json for PEFT's."""
_MAX_ALPHA = 1e9  # beyond any real use; products in f32 stay finite
_FROM_TRAINING = "Take the file from the training again"

# fields of every kind that say where an adapter comes from or which modules it has, or had their effect in training
_COMMON = frozenset(
    {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "fan_in_fan_out", "ensure_weight_tying"),
    }
)
_FOUR_BIT_NAME = re.compile(r"(bnb[-_]?4bit|[-_]4bit|[-_]nf4)\b", re.IGNORECASE)


class PeftConfig:
    """adapter_config.json. Values are checked when they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stated = read_json(path)
        self.raw = as_peft_config(path, stated) if is_mlx(stated) else stated
        if ranges := self.raw.get("layer_replication"):
            self.raw = {**self.raw, "blocks": _replicated(path, ranges)}

    @property
    def peft_type(self) -> object:
        """The kind of the adapter, as PEFT names it; of a method that PEFT does not have, edgetune's name."""
        return self.raw.get("edgetune_method") or self.raw.get("peft_type", self.raw.get("swift_type"))

    def unknown_fields(self, known: Collection[str]) -> list[str]:
        """Return the fields with a value that are neither common to all kinds nor in `known`, sorted."""
        return sorted(name for name, value in self.raw.items() if value and name not in known and name not in _COMMON)

    @property
    def four_bit_base(self) -> str | None:
        """The name of the base that the adapter was trained on, if that is one in 4 bits."""
        name = self.raw.get("base_model_name_or_path")
        return name if isinstance(name, str) and _FOUR_BIT_NAME.search(name) else None

    @property
    def is_transposed(self) -> bool:
        """Whether the adapter states that its layers store their weights transposed (`fan_in_fan_out`)."""
        return bool(self.raw.get("fan_in_fan_out"))

    def names_parameter(self, target: str) -> bool:
        """Whether `target_parameters` names this tensor."""
        return any(target.endswith(name) for name in self.raw.get("target_parameters") or ())

    @property
    def token_field(self) -> str:
        """The field with the ids of trained tokens."""
        return "token_indices" if self.peft_type == "TRAINABLE_TOKENS" else "trainable_token_indices"

    def token_ids(self, module: str) -> list[int]:
        """Return the ids of `trainable_token_indices` for an embedding.

        Raises AdapterError when there are none, or when they are no natural numbers without repetition.
        """
        stated = self.raw.get(self.token_field)
        if isinstance(stated, dict):
            stated = next((ids for name, ids in stated.items() if f".{module}".endswith(f".{name}")), None)
        is_list = isinstance(stated, list) and all(type(number) is int and number >= 0 for number in stated)
        if not stated or not is_list or len(set(stated)) != len(stated):
            raise AdapterError(
                f"{self.path}: {self.token_field} for {module} is {stated!r}, not a list of ids", _FROM_TRAINING
            )
        found: list[int] = stated
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Return a field that is a finite number. Raises AdapterError."""
        value: Any = self.raw.get(name, default)
        if type(value) not in (int, float) or not abs(value) < _MAX_ALPHA:
            raise AdapterError(f"{self.path}: {name} is {value!r}, not a number", _FROM_TRAINING)
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a field that is a whole number, 0 or greater. Raises AdapterError."""
        value = self.raw.get(name, default)
        if type(value) is not int or value < 0:
            raise AdapterError(f"{self.path}: {name} is {value!r}, not a natural number", _FROM_TRAINING)
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return a field that is true or false. Raises AdapterError."""
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise AdapterError(f"{self.path}: {name} is {value!r}, not true or false", _FROM_TRAINING)
        return value

    def rank_and_alpha(self, module: str, alpha_field: str = "lora_alpha") -> tuple[int, float]:
        """Return rank and alpha of a module; patterns apply. Raises AdapterError."""
        rank = _patterned(self.raw.get("rank_pattern"), module, self.raw.get("r"))
        alpha = _patterned(self.raw.get("alpha_pattern"), module, self.raw.get(alpha_field))
        if type(rank) is not int or rank <= 0 or type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
            raise AdapterError(
                f"{self.path}: r is {rank!r} and {alpha_field} is {alpha!r} for {module}",
                f"A positive whole number and a number are needed. {_FROM_TRAINING}",
            )
        return rank, alpha

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return rank and scale of B @ A of a module: alpha/r, or alpha/sqrt(r) with rsLoRA; patterns apply."""
        rank, alpha = self.rank_and_alpha(module)
        return rank, alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)


def _replicated(path: Path, ranges: Any) -> list[int]:
    """Return the block of the base that each block is a copy of, for ranges [first, end]. Raises AdapterError."""
    pairs = isinstance(ranges, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair) for pair in ranges
    )
    if not pairs:
        raise AdapterError(f"{path}: layer_replication is {ranges!r}, not a list of ranges", _FROM_TRAINING)
    return [number for first, end in ranges for number in range(first, end)]


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""
    if patterns and not isinstance(patterns, dict):
        raise AdapterError(f"{CONFIG_FILE}: rank_pattern and alpha_pattern must be objects, not {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(f"{CONFIG_FILE}: {pattern!r} is not a pattern: {error}") from error
    return default
