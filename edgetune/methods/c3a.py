"""C3A: updates of circulant blocks (arXiv:2407.19342)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Facts, LayerMethod, Layers, of_pattern


class C3a(LayerMethod):
    """C3A: the update consists of circulant blocks, applied by circular convolution (arXiv:2407.19342)."""

    facts: ClassVar[Facts] = Facts(
        "C3A", "arXiv:2407.19342", "reparametrized", "C3A",
        no_low_rank="circulant blocks have full rank",
    )  # fmt: skip
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {"init"}

    kind: Literal["c3a"] = "c3a"
    """The PEFT method."""
    block_size: Count = 256
    """Size of the blocks, which must divide inputs and outputs of each layer; the larger, the fewer parameters."""
    block_size_pattern: dict[str, Count] = {}
    """Sizes by the end of the layer's name, or by a regular expression."""
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zero"] = "xavier_uniform"
    """First values of the blocks; `zero` starts from the base."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return super().peft_options() | {"init_weights": True if self.init == "zero" else self.init}

    def count_trainable(self, layers: Layers) -> int:
        """Return the values of the blocks, one row of each."""
        sizes = {name: of_pattern(self.block_size_pattern, name, self.block_size) for name in layers}
        return sum(rows * columns // sizes[name] for name, (rows, columns) in layers.items())
