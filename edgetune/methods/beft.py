"""BEFT: trained biases of the value projections (arXiv:2509.15974)."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgetune.methods.base import Facts, PerLayerMethod


class Beft(PerLayerMethod):
    """BEFT: a trained bias is added to the value projections (arXiv:2509.15974)."""

    facts: ClassVar[Facts] = Facts(
        "BEFT", "arXiv:2509.15974", "additive", "BEFT",
        not_as={"gguf-lora": "gguf-lora holds no biases"},
    )  # fmt: skip

    kind: Literal["beft"] = "beft"
    """The PEFT method."""
    target_modules: str | list[str] = "v"
    """Layers whose outputs get a bias, as for other kinds: `v`, `q_v`, names, or a regular expression."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of the bias."""
        return rows
