"""The table of model families, and how a config.json is matched with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from edgetune_converters.architectures.class_defaults import CLASS_DEFAULTS
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families import FAMILIES
from edgetune_converters.architectures.model_types import MODEL_TYPES
from edgetune_converters.architectures.table import (
    BoundTensor,
    Family,
    Head,
    Piece,
    bind,
    expert_slices,
    stored_transposed,
    targets,
)
from edgetune_converters.errors import ArchitectureError

__all__ = [
    "FAMILIES",
    "BoundTensor",
    "Family",
    "Head",
    "ModelConfig",
    "Piece",
    "bind",
    "completed_config",
    "expert_slices",
    "family_of",
    "stored_transposed",
    "supported_names",
    "targets",
    "transposed_matrices",
]


def supported_names() -> list[str]:
    """Return the `architectures` entries of config.json that are supported."""
    return [name for family in FAMILIES for name in family.hf]


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model.

    Raises ArchitectureError with the supported entries for an unknown model.
    """
    stated = config.get("architectures", [])
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    if not names:  # transformers then takes the class of model_type
        names = [name for name, model_type in MODEL_TYPES.items() if model_type == config.get("model_type")]
    bare = [re.sub(r"(Text)?Model$", "", name) for name in names if name.endswith("Model")]  # saved without its head
    names += [name + head for name in bare for head in ("ForCausalLM", "LMHeadModel")]
    for family in FAMILIES:
        if any(name in family.hf for name in names):
            return family
    shown = ", ".join(name for name in stated if isinstance(name, str)) if isinstance(stated, list) else ""
    raise ArchitectureError(
        f"`architectures` in config.json is {shown or 'empty'}, which is not supported",
        f"Supported: {', '.join(supported_names())}",
    )


def completed_config(raw: Mapping[str, Any], *, class_defaults: bool = True) -> ModelConfig:
    """Return a config.json with the family's defaults for what it leaves out, and those of transformers' class.

    Without `class_defaults` only with those of the family: what a GGUF file does not state, the model does not have.

    Raises:
        ArchitectureError: The model is of an unknown family.
    """
    config = ModelConfig(raw)
    family = family_of(config)
    completed = config.completed(family.defaults)
    return completed.completed(CLASS_DEFAULTS.get(family.hf[0], {})) if class_defaults else completed


def transposed_matrices(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Return those of the names of weights that the checkpoints of this model store transposed, as GPT-2's Conv1D."""
    if not names:
        return set()
    complete = completed_config(config)
    family = family_of(complete)
    rows = [row for row in family.tensors if row.is_transposed_matrix(complete)]
    patterns = [re.compile(re.escape(row.module + row.weight).replace(r"\{layer\}", r"\d+")) for row in rows]
    return {name for name in names if any(pattern.fullmatch(family.canonical_name(name)) for pattern in patterns)}
