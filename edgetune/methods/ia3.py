"""IA3: learned factors of activations (arXiv:2205.05638)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from edgetune.methods.base import Facts, LayerMethod


class Ia3(LayerMethod):
    """IA3: a learned factor for each output of a layer, or each input of a feed-forward layer (arXiv:2205.05638)."""

    facts: ClassVar[Facts] = Facts("IA3", "arXiv:2205.05638", "additive", "IA3")

    kind: Literal["ia3"] = "ia3"
    """The PEFT method."""
    feedforward_modules: list[str] = ["down_proj", "fc2", "dense_4h_to_h", "c_proj"]
    """Layers whose inputs are scaled in place of their outputs, if they are adapted."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {"target_modules": self.target_modules, "feedforward_modules": self.feedforward_modules}

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the factors of the outputs or of the inputs, whichever are more."""
        return max(rows, columns)
