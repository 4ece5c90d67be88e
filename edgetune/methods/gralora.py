"""GraLoRA: low-rank updates of sub-blocks (arXiv:2505.20355)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Count, Dropout, Facts, PerLayerMethod, Positive


class GraLora(PerLayerMethod):
    """GraLoRA: each sub-block of a layer has a low-rank update of its own (arXiv:2505.20355)."""

    facts: ClassVar[Facts] = Facts("GraLoRA", "arXiv:2505.20355", "reparametrized", "GRALORA")
    peft_names: ClassVar[Mapping[str, str]] = {"blocks": "gralora_k", "dropout": "gralora_dropout"}

    kind: Literal["gralora"] = "gralora"
    """The PEFT method."""
    r: Count = 32
    """Rank; a layer has as many parameters as with LoRA of this rank."""
    hybrid_r: Annotated[int, Field(ge=0)] = 0
    """Rank of plain LoRA beside it."""
    alpha: Positive = 64
    """The update is scaled by alpha / (r + hybrid_r)."""
    blocks: Count = 2
    """Sub-blocks in each direction; it must divide `r`, and inputs and outputs of each layer."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.r % self.blocks:
            yield f"adapter.r is {self.r}, which adapter.blocks ({self.blocks}) does not divide"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of all factors."""
        return (self.r + self.hybrid_r) * (rows + columns)
