"""adapter_config.json of PEFT: which adapters can be merged, and the rank and the scale of each pair.

Variants that are not plain LoRA are refused by name: merged like plain LoRA, they would silently give a wrong model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.adapters.mlx import as_peft_config, is_mlx
from edgetune_converters.errors import AdapterError
from edgetune_converters.files.contents import read_json

CONFIG_FILE = "adapter_config.json"
_MAX_ALPHA = 1e9  # beyond any real use; products in f32 stay finite
_FROM_TRAINING = "Take the file from the training again"
_MERGE_FIRST = "Merge it with PEFT first"

# initializations that leave the base unchanged; all others move a part of the base into A and B
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")

# field of adapter_config.json that is not supported -> name of the variant
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer replication (layer_replication)",
    # of ms-swift before version 3
    "use_qa_lora": "QA-LoRA (use_qa_lora)",
    "use_merged_linear": "merged linear layers (use_merged_linear)",
    "enable_lora": "parts of merged linear layers (enable_lora)",
}

# fields that are read above, below or by their tensors, and fields that had their effect in training alone
_KNOWN = frozenset(
    {
        *_UNSUPPORTED,
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
        *("init_lora_weights", "target_parameters", "trainable_token_indices", "bias", "lora_bias", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
        *("lora_dropout", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "velora_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "group_size", "model_key_mapping"),
        *("loraplus_lr_ratio", "loraplus_lr_embedding", "unsloth_version", "unsloth_fixed", "merge_weights"),
    }
)
_FOUR_BIT_NAME = re.compile(r"(bnb[-_]?4bit|[-_]4bit|[-_]nf4)\b", re.IGNORECASE)


class PeftConfig:
    """adapter_config.json. Raises AdapterError for an adapter that is not plain LoRA."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stated = read_json(path)
        self.raw = as_peft_config(path, stated) if is_mlx(stated) else stated
        _check_kind(self.raw)

    @property
    def unknown_fields(self) -> list[str]:
        """The fields with a value that are not known here, sorted."""
        return sorted(name for name, value in self.raw.items() if value and name not in _KNOWN)

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

    def token_ids(self, module: str) -> list[int]:
        """Return the ids of `trainable_token_indices` for an embedding.

        Raises AdapterError when there are none, or when they are no natural numbers without repetition.
        """
        stated = self.raw.get("trainable_token_indices")
        if isinstance(stated, dict):
            stated = next((ids for name, ids in stated.items() if f".{module}".endswith(f".{name}")), None)
        is_list = isinstance(stated, list) and all(type(number) is int and number >= 0 for number in stated)
        if not stated or not is_list or len(set(stated)) != len(stated):
            raise AdapterError(
                f"{self.path}: trainable_token_indices for {module} is {stated!r}, not a list of ids", _FROM_TRAINING
            )
        found: list[int] = stated
        return found

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return rank and scale of B @ A of a module: alpha/r, or alpha/sqrt(r) with rsLoRA; patterns apply."""
        rank = _patterned(self.raw.get("rank_pattern"), module, self.raw.get("r"))
        alpha = _patterned(self.raw.get("alpha_pattern"), module, self.raw.get("lora_alpha"))
        if type(rank) is not int or rank <= 0 or type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
            raise AdapterError(
                f"{self.path}: r is {rank!r} and lora_alpha is {alpha!r} for {module}",
                f"A positive whole number and a number are needed. {_FROM_TRAINING}",
            )
        return rank, alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)


def _check_kind(config: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA."""
    kind = config.get("peft_type", config.get("swift_type"))
    if kind != "LORA":
        raise AdapterError(f"the adapter is of the kind {kind}; only LORA can be merged", _MERGE_FIRST)
    for name, meaning in _UNSUPPORTED.items():
        if config.get(name):
            raise AdapterError(f"the adapter uses {meaning}, which cannot be merged yet", _MERGE_FIRST)
    start = config.get("init_lora_weights", True)
    if start not in _BASE_UNCHANGED:
        raise AdapterError(
            f"the adapter was initialized with {start!r}, which moves the base: it does not fit the original one",
            "Convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


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
