"""IA3: learned factors of activations (arXiv:2205.05638)."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Facts, LayerMethod, Layers


class Ia3(LayerMethod):
    """IA3: a learned factor for each output of a layer, or each input of a feed-forward layer (arXiv:2205.05638)."""

    facts: ClassVar[Facts] = Facts(
        "IA3", "arXiv:2205.05638", "additive", "IA3",
        no_low_rank="factors of rows and columns have no low rank",
    )  # fmt: skip

    options_naming_layers: ClassVar[tuple[str, ...]] = ("feedforward_modules",)

    kind: Literal["ia3"] = "ia3"
    """The PEFT method."""
    feedforward_modules: list[str] = ["down_proj", "fc2", "dense_4h_to_h", "c_proj"]
    """Layers whose inputs are scaled in place of their outputs, if they are adapted."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names; a pattern of names, as PEFT compares lists with `target_modules`."""
        names = "|".join(map(re.escape, self.feedforward_modules))
        return super().peft_options() | {"feedforward_modules": rf"(.*\.)?({names})" if names else []}

    def count_trainable(self, layers: Layers) -> int:
        """Return the factors of all layers."""
        return sum(shape[name.rpartition(".")[2] in self.feedforward_modules] for name, shape in layers.items())
