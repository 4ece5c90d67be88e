"""Prefix tuning and P-tuning v2: keys and values before every text, in every layer (arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts, Surroundings
from edgetune.methods.virtual_tokens import VirtualTokenMethod

_NO_PLACE = "the format has no place for keys and values before a text; transformers loads the adapter with PEFT"


class PrefixTuning(VirtualTokenMethod):
    """Prefix tuning: trained keys and values before every text in every layer (arXiv:2101.00190).

    Without `projection` it is P-tuning v2 (arXiv:2110.07602).
    """

    facts: ClassVar[Facts] = Facts(
        "prefix tuning", "arXiv:2101.00190", "additive", "PREFIX_TUNING",
        not_as={"gguf-lora": "a prefix changes no matrix", "safetensors": _NO_PLACE},
    )  # fmt: skip
    used_with: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "encoder_hidden_size": ("projection", True),
    }

    takes_checkpointing: ClassVar[bool] = False

    kind: Literal["prefix-tuning"] = "prefix-tuning"
    """The PEFT method."""
    projection: bool = False
    """Make keys and values with a network of two layers, which makes the training of long prefixes steadier."""
    encoder_hidden_size: Annotated[int, Field(ge=1)] = 128
    """Width of that network."""

    def conflicts(self, surroundings: Surroundings) -> Iterator[str]:
        """Yield what contradicts the rest of the configuration, each a sentence that says what to do."""
        yield from super().conflicts(surroundings)
        if surroundings.gradient_checkpointing:
            yield (
                "adapter.kind: prefix-tuning cannot be trained with gradient checkpointing, which drops the keys and "
                "values before a text; set training.gradient_checkpointing: false"
            )

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        own = {"encoder_hidden_size": self.encoder_hidden_size} if self.projection else {}
        return {**super().peft_options(), "prefix_projection": self.projection, **own}
