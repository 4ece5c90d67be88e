"""GLoRA: weights and biases scaled and shifted (arXiv:2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Facts, LayerMethod


class GLora(LayerMethod):
    """GLoRA: weights and biases of each layer are scaled and shifted by trained terms (arXiv:2306.07967)."""

    facts: ClassVar[Facts] = Facts(
        "GLoRA", "arXiv:2306.07967", "reparametrized", "GLORA",
        not_on=dict.fromkeys((4, 8), "PEFT adapts plain linear layers alone"),
        no_low_rank="the product with the base has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "weight_terms": "config_A_B", "coupling": "config_C", "bias_terms": "config_D_E",
    }  # fmt: skip

    kind: Literal["glora"] = "glora"
    """The PEFT method."""
    r: Count = 8
    """Rank of the terms that are low-rank matrices."""
    weight_terms: Literal["lora", "vector", "constant", "none"] = "lora"
    """The form of the terms that scale and shift the weight."""
    coupling: Literal["lora", "vector", "none"] = "lora"
    """The form of the term by which the weight shifts the bias; unused in layers without bias."""
    bias_terms: Literal["vector", "constant", "none"] = "constant"
    """The form of the terms that scale and shift the bias; unused in layers without bias."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the terms of the weight; those of the bias are few and depend on the base."""
        matrix = {"lora": self.r * (rows + columns), "vector": rows, "constant": 1, "none": 0}
        return 2 * matrix[self.weight_terms]
