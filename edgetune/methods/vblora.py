"""VB-LoRA: low-rank updates composed from a shared bank of vectors (arXiv:2405.15179)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from edgetune.methods.base import Count, Dropout, Facts, Layers, PerLayerMethod, Positive


class VbLora(PerLayerMethod):
    """VB-LoRA: the factors of all layers are mixed from one bank of vectors (arXiv:2405.15179)."""

    facts: ClassVar[Facts] = Facts("VB-LoRA", "arXiv:2405.15179", "reparametrized", "VBLORA")
    peft_names: ClassVar[Mapping[str, str]] = {
        "top_k": "topk", "dropout": "vblora_dropout", "bank_bound": "init_vector_bank_bound",
        "logits_std": "init_logits_std",
    }  # fmt: skip

    kind: Literal["vblora"] = "vblora"
    """The PEFT method."""
    r: Count = 4
    """Rank of the update."""
    num_vectors: Count = 256
    """Vectors in the bank."""
    vector_length: Count = 256
    """Length of the vectors, which must divide inputs and outputs of each layer."""
    top_k: Count = 2
    """Vectors that are mixed for each part of a factor."""
    dropout: Dropout = 0.0
    """Dropout before the first factor during training."""
    bank_bound: Positive = 0.02
    """First values of the bank lie between minus and plus this number."""
    logits_std: Positive = 0.1
    """Standard deviation of the first mixing logits."""

    @model_validator(mode="after")
    def _bank_is_large_enough(self) -> Self:
        if self.top_k > self.num_vectors:
            raise ValueError(f"adapter.top_k is {self.top_k}, and adapter.num_vectors only {self.num_vectors}")
        return self

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the mixing logits of both factors."""
        return self.r * self.num_vectors * (rows // self.vector_length + columns // self.vector_length)

    def count_trainable(self, layers: Layers) -> int:
        """Return the mixing logits of all layers and the values of the bank."""
        return super().count_trainable(layers) + self.num_vectors * self.vector_length
