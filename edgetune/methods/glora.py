"""GLoRA: weights and biases scaled and shifted (arXiv:2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Facts, Layers, PerLayerMethod


class GLora(PerLayerMethod):
    """GLoRA: weights and biases of each layer are scaled and shifted by trained terms (arXiv:2306.07967)."""

    facts: ClassVar[Facts] = Facts(
        "GLoRA", "arXiv:2306.07967", "reparametrized", "GLORA",
        not_on=dict.fromkeys((4, 8), "PEFT adapts plain linear layers alone"),
        no_low_rank="the product with the base has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "weight_terms": "config_A_B", "coupling": "config_C", "bias_terms": "config_D_E",
    }  # fmt: skip
    options_of_biases: ClassVar[tuple[str, ...]] = ("coupling", "bias_terms")

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
        """Return the parameters of the terms of the weight."""
        matrix = {"lora": self.r * (rows + columns), "vector": rows, "constant": 1, "none": 0}
        return 2 * matrix[self.weight_terms]

    def count_of_biases(self, layers: Layers) -> int:
        """Return the parameters of the terms of the bias."""
        return sum(self._of_bias(rows, columns) for rows, columns in layers.values())

    def _of_bias(self, rows: int, columns: int) -> int:
        coupling = {"lora": self.r * (columns + 1), "vector": columns, "none": 0}
        terms = {"vector": rows, "constant": 1, "none": 0}
        return coupling[self.coupling] + 2 * terms[self.bias_terms]
