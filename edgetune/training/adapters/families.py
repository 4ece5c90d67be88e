"""The table of adapter families: `adapter.kind` in the configuration -> the functions that differ between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from edgetune.config import AdapterConfig
from edgetune.training.adapters import lora


@dataclass(frozen=True)
class AdapterFamily:
    """A family of PEFT methods."""

    peft_config: Callable[[AdapterConfig], PeftConfig]
    """Translate our options into PEFT's."""
    is_zero: Callable[[Any], bool]
    """Whether an adapter on a model changes nothing."""


FAMILIES: Mapping[str, AdapterFamily] = {
    "lora": AdapterFamily(lora.peft_config, lora.is_zero),
}
