"""BOFT: rotated inputs and scaled outputs (arXiv:2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Dropout, Facts, PerLayerMethod


class Boft(PerLayerMethod):
    """BOFT: rotated inputs in blocks, as OFT, and scaled outputs (arXiv:2311.06243).

    One butterfly factor: PEFT compiles a CUDA kernel for more, and takes one where it cannot.
    """

    facts: ClassVar[Facts] = Facts(
        "BOFT", "arXiv:2311.06243", "reparametrized", "BOFT",
        no_low_rank="a rotation of the base has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"block_size": "boft_block_size", "dropout": "boft_dropout"}

    kind: Literal["boft"] = "boft"
    """The PEFT method."""
    block_size: Annotated[int, Field(ge=2)] = 4
    """Inputs that are rotated together; it must divide the inputs of each layer."""
    dropout: Dropout = 0.0
    """Probability to leave a block unrotated during training."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the blocks, and a scale for each output."""
        return columns * self.block_size + rows
