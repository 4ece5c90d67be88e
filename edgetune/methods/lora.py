"""LoRA and rsLoRA: low-rank matrices beside linear layers (arXiv:2106.09685, arXiv:2312.03732)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts, LayerMethod


class Lora(LayerMethod):
    """LoRA: low-rank matrices beside the linear layers of the base (arXiv:2106.09685)."""

    facts: ClassVar[Facts] = Facts("LoRA", "arXiv:2106.09685", "reparametrized", "LORA")

    kind: Literal["lora"] = "lora"
    """The PEFT method."""
    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the first low-rank matrix during training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732)."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
            "use_rslora": self.use_rslora,
        }

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of A and B."""
        return self.r * (rows + columns)
