"""AdaLoRA: low-rank updates whose ranks follow their importance (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, PerLayerMethod, Positive


class AdaLora(PerLayerMethod):
    """AdaLoRA: the ranks of the layers are cut during training, where they matter least (arXiv:2303.10512)."""

    facts: ClassVar[Facts] = Facts("AdaLoRA", "arXiv:2303.10512", "reparametrized", "ADALORA")
    peft_names: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout", "interval": "deltaT"}
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {
        *("initial_steps", "final_steps", "orthogonality"),
    }
    # PEFT adds the regularization to a loss that TRL does not use; the training adds its gradient
    fixed_options: ClassVar[Mapping[str, Any]] = {"orth_reg_weight": 0.0}

    kind: Literal["adalora"] = "adalora"
    """The PEFT method."""
    init_r: Count = 12
    """Rank of every layer at the start."""
    target_r: Count = 8
    """Mean rank of the layers at the end."""
    alpha: Positive = 32
    """The update is scaled by alpha / init_r."""
    dropout: Dropout = 0.0
    """Dropout before the first low-rank matrix during training."""
    initial_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps before ranks are cut. Default: a tenth of all steps."""
    final_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps after the last cut. Default: three tenths of all steps."""
    interval: Count = 1
    """Cut ranks every N steps."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the importance."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the uncertainty of the importance."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the regularization that keeps the factors orthogonal; the losses that are shown are without it."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.target_r > self.init_r:
            yield f"adapter.target_r is {self.target_r}, above adapter.init_r ({self.init_r}): AdaLoRA only cuts ranks"

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names; the training sets its number of steps."""
        return super().peft_options() | {"total_step": 2**31, "tinit": 0, "tfinal": 0}

    def phases(self, steps: int) -> tuple[int, int]:
        """Return the steps before the first and after the last cut, of so many in all."""
        initial = steps // 10 if self.initial_steps is None else self.initial_steps
        return initial, 3 * steps // 10 if self.final_steps is None else self.final_steps

    def why_not_steps(self, steps: int) -> str | None:
        """Return why a training of so many steps has no time to cut ranks; None if it has."""
        initial, final = self.phases(steps)
        if steps - final > initial:
            return None
        return f"{initial} initial and {final} final steps leave none of {steps} to cut ranks in"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the factors and of the singular values between them."""
        return self.init_r * (rows + columns + 1)
