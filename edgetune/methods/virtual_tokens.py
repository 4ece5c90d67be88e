"""What the methods that train virtual tokens before every text have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from edgetune.methods.base import Method

NO_LORA_FORM = "a soft prompt changes no matrix, and a GGUF adapter cannot add tokens"
"""Why a soft prompt cannot be exported as gguf-lora."""
NO_LORA: Mapping[str, str] = {"gguf-lora": NO_LORA_FORM}


class VirtualTokenMethod(Method):
    """A method that trains virtual tokens before every text; the base stays as it is."""

    tokens: Annotated[int, Field(ge=1)] = 20
    """Number of virtual tokens."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {"num_virtual_tokens": self.tokens}

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return 0: no layer of the base is adapted."""
        return 0

    @property
    def virtual_tokens(self) -> int:
        """Tokens of the context that the method takes before every text."""
        return self.tokens
