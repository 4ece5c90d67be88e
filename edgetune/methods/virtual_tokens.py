"""What the methods that train virtual tokens before every text have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from edgetune.methods.base import Layers, Method, Surroundings

NO_LORA_FORM = "a soft prompt changes no matrix, and a GGUF adapter cannot add tokens"
"""Why a soft prompt cannot be exported as gguf-lora."""
NO_LORA: Mapping[str, str] = {"gguf-lora": NO_LORA_FORM}


_OBJECTIVES = ("sft", "pretrain")
"""The objectives whose trainers leave out the logits of virtual tokens."""


class VirtualTokenMethod(Method):
    """A method that trains virtual tokens before every text; the base stays as it is."""

    tokens: Annotated[int, Field(ge=1)] = 20
    """Number of virtual tokens."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {"num_virtual_tokens": self.tokens}

    def count_trainable(self, layers: Layers) -> int:
        """Return 0: no layer of the base is adapted."""
        return 0

    def conflicts(self, surroundings: Surroundings) -> Iterator[str]:
        """Yield what contradicts the rest of the configuration, each a sentence that says what to do."""
        yield from super().conflicts(surroundings)
        if surroundings.merge_base == "auto":
            yield (
                "export.merge_base: auto compares models with merged changes, and virtual tokens change nothing of the "
                "base; set export.merge_base: original, or nf4"
            )
        if surroundings.objective not in _OBJECTIVES:
            yield (
                f"adapter.kind: {self.kind} cannot be trained with objective.kind: {surroundings.objective}, whose "
                f"trainer does not know virtual tokens; set objective.kind: {' or '.join(_OBJECTIVES)}"
            )

    @property
    def virtual_tokens(self) -> int:
        """Tokens of the context that the method takes before every text."""
        return self.tokens
