"""RoAd: outputs rotated and scaled in pairs (arXiv:2409.00119)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgetune.methods.base import Facts, PerLayerMethod


class Road(PerLayerMethod):
    """RoAd: the outputs of each layer are rotated and scaled in pairs (arXiv:2409.00119)."""

    facts: ClassVar[Facts] = Facts(
        "RoAd", "arXiv:2409.00119", "reparametrized", "ROAD",
        no_low_rank="a rotation of the base has no low rank",
    )  # fmt: skip

    kind: Literal["road"] = "road"
    """The PEFT method."""
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """Parameters for each pair of outputs: 2, 4 or 8."""
    group_size: Annotated[int, Field(ge=2)] = 64
    """Outputs within which pairs are formed; even, and a divisor of the outputs of each layer."""

    @model_validator(mode="after")
    def _groups_have_pairs(self) -> Self:
        if self.group_size % 2:
            raise ValueError(f"adapter.group_size is {self.group_size}: give an even number")
        return self

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the angles and scales of the outputs."""
        return rows * int(self.variant[-1])
