"""MiSS: one small matrix, repeated over the inputs (arXiv:2409.15371)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, PerLayerMethod, Surroundings


class MiSS(PerLayerMethod):
    """MiSS: one small matrix for each layer, repeated over its inputs (arXiv:2409.15371)."""

    facts: ClassVar[Facts] = Facts("MiSS", "arXiv:2409.15371", "reparametrized", "MISS")
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "miss_dropout"}
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {"init"}

    kind: Literal["miss"] = "miss"
    """The PEFT method."""
    r: Count = 64
    """Inputs that have a row of their own; the others repeat them."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    init: Literal["balance", "bat", "mini"] = "balance"
    """The variant: `balance`; `bat`, whose update is multiplied by blocks of the base; `mini`, with `mini_r`."""
    mini_r: Count = 1
    """Outputs that have a column of their own with `init: mini`; it must divide the outputs."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        # run.json states defaults too, so that a stated default is no contradiction
        if self.mini_r != type(self).model_fields["mini_r"].default and self.init != "mini":
            yield f"adapter.mini_r is used with adapter.init: mini alone, and init is {self.init}"

    def conflicts(self, surroundings: Surroundings) -> Iterator[str]:
        """Yield what contradicts the rest of the configuration."""
        yield from super().conflicts(surroundings)
        if self.init == "bat" and surroundings.bits != 16:
            yield (
                f"adapter.init: bat multiplies by the weights of the base, which quantization.bits: "
                f"{surroundings.bits} packs; set quantization.bits: 16"
            )

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return super().peft_options() | {"init_weights": True if self.init == "balance" else self.init}

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can, or PEFT says so itself."""
        if self.init == "mini" and rows % self.mini_r:
            return f"adapter.mini_r is {self.mini_r}, which does not divide its {rows} outputs"
        return super().why_not_on(rows, columns)

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of the repeated matrix."""
        return self.r * {"balance": rows, "bat": rows // self.r * self.r, "mini": self.mini_r}[self.init]
