"""UniLoRA: all factors taken from one short vector (arXiv:2506.00799)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, Layers, Positive


class UniLora(LayerMethod):
    """UniLoRA: the factors of all layers are taken from one trained vector (arXiv:2506.00799)."""

    facts: ClassVar[Facts] = Facts(
        "UniLoRA", "arXiv:2506.00799", "reparametrized", "UNILORA",
        not_on=dict.fromkeys((4, 8), "PEFT rounds its scales to the integers of the packed weights"),
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "length": "theta_d_length", "dropout": "unilora_dropout", "seed": "proj_seed", "bound": "init_theta_d_bound",
    }  # fmt: skip
    fixed_options: ClassVar[Mapping[str, Any]] = {"save_indices": True}

    kind: Literal["unilora"] = "unilora"
    """The PEFT method."""
    r: Count = 4
    """Rank of the update."""
    length: Count = 256
    """Trained numbers, which all layers share."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    bound: Positive = 0.02
    """The first numbers lie between minus and plus this one."""
    seed: int = 42
    """Seed of the assignment, which is stored with the adapter."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the length of the shared vector."""
        return self.length if layers else 0

    def count_frozen(self, layers: Layers) -> int:
        """Return the assigned numbers (in 64 bits) and scales of all factors."""
        return 3 * self.r * sum(sum(shape) for shape in layers.values())
