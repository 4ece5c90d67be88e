"""Which family a model is of, from its config.json."""

from __future__ import annotations

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families import FAMILIES
from edgetune_converters.architectures.table import BoundTensor, Family, Head, Piece, bind, stored_transposed, targets
from edgetune_converters.errors import ArchitectureError

__all__ = [
    "FAMILIES",
    "BoundTensor",
    "Family",
    "Head",
    "ModelConfig",
    "Piece",
    "bind",
    "family_of",
    "stored_transposed",
    "supported_names",
    "targets",
]


def supported_names() -> list[str]:
    """The `architectures` entries of config.json that are supported."""
    return [name for family in FAMILIES for name in family.hf]


def family_of(config: ModelConfig) -> Family:
    """The family of a model. Errors: ArchitectureError listing those that are known."""
    stated = config.get("architectures", [])
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    for family in FAMILIES:
        if any(name in family.hf for name in names):
            return family
    said = ", ".join(names) or "nothing in its `architectures`"
    raise ArchitectureError(
        f"config.json says {said}, which is not supported", f"Supported: {', '.join(supported_names())}"
    )
