"""Super and Supra: the largest weights, with or without LoRA (arXiv:2607.09287)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Count, Dropout, Facts, Layers, PerLayerMethod, Positive


class SuperTuning(PerLayerMethod):
    """Super: the weights of largest magnitude are trained; Supra: beside LoRA (arXiv:2607.09287)."""

    facts: ClassVar[Facts] = Facts(
        "Super", "arXiv:2607.09287", "selective", "SUPERTUNING",
        not_on=dict.fromkeys((4, 8), "the magnitudes of packed weights are unknown to PEFT"),
        no_low_rank="a sparse update has full rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    starts_from_base: ClassVar[bool] = True

    kind: Literal["supertuning"] = "supertuning"
    """The PEFT method."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the weights of a layer that stay as they are."""
    select_top: bool = True
    """Train the largest weights; false: the smallest."""
    r: Count | None = None
    """Rank of LoRA beside them (Supra). Default: none (Super)."""
    alpha: Positive | None = None
    """LoRA is scaled by alpha / r. Default: 2 r."""
    dropout: Dropout = 0.0
    """Dropout before LoRA during training."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        given = [f"adapter.{name}" for name in ("alpha", "dropout") if getattr(self, name)]
        if self.r is None and given:
            yield f"{' and '.join(given)} belong to LoRA beside the trained weights: give adapter.r too"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the number of trained weights, and the parameters of LoRA."""
        return int(rows * columns * (1 - self.sparsity)) + (self.r or 0) * (rows + columns)

    def count_frozen(self, layers: Layers) -> int:
        """Return the numbers of the trained weights, in 64 bits."""
        return 2 * sum(int(rows * columns * (1 - self.sparsity)) for rows, columns in layers.values())
