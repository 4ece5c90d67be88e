"""DEFT: a subspace of the base removed and refilled (NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, PerLayerMethod


class Deft(PerLayerMethod):
    """DEFT: a trained subspace of the base is removed, and a low-rank matrix put into it (NeurIPS 2025)."""

    facts: ClassVar[Facts] = Facts(
        "DEFT", "NeurIPS 2025", "reparametrized", "DEFT",
        not_on=dict.fromkeys((4, 8), "PEFT starts from projections of the packed weights"),
        no_low_rank="it takes a projection out of the base",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "deft_dropout", "decomposition": "decomposition_method"}

    kind: Literal["deft"] = "deft"
    """The PEFT method."""
    r: Count = 8
    """Rank of the subspace."""
    alpha: Count | None = None
    """The injected matrix is scaled by alpha / r. Default: not scaled."""
    decomposition: Literal["relu", "qr"] = "relu"
    """The projector of the subspace: `relu` of the trained matrix, or an orthogonal one by `qr`."""
    para: bool = False
    """Remove the subspace only (PaRa), and inject nothing."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.para and self.alpha is not None:
            yield "adapter.alpha scales what is injected, and adapter.para: true injects nothing; give one of them"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the projector and of the injected matrix."""
        return self.r * (rows + (0 if self.para else columns))
