"""Full fine-tuning: every weight of the base is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Facts
from edgetune.methods.freeze import SIXTEEN_BITS
from edgetune.methods.selective import NO_LOW_RANK, SelectiveMethod, count_values


class Full(SelectiveMethod):
    """Full fine-tuning: every weight of the base is trained, in 32 bits; `adapter/` holds the whole model."""

    facts: ClassVar[Facts] = Facts(
        "full fine-tuning",
        "-",
        "selective",
        None,
        not_on=dict.fromkeys((4, 8), SIXTEEN_BITS),
        not_as={"gguf-lora": NO_LOW_RANK},
    )

    kind: Literal["full"] = "full"
    """The method."""

    def count_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return all weights."""
        return count_values(shapes)
