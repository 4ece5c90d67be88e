"""HRA: a chain of Householder reflections (arXiv:2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Facts, PerLayerMethod


class Hra(PerLayerMethod):
    """HRA: the inputs of each layer pass a chain of trained Householder reflections (arXiv:2405.17484)."""

    facts: ClassVar[Facts] = Facts(
        "HRA", "arXiv:2405.17484", "reparametrized", "HRA",
        not_on=dict.fromkeys((4, 8), "PEFT multiplies the packed weights by the reflections"),
        no_low_rank="a chain of reflections multiplies the base",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"gram_schmidt": "apply_GS"}

    kind: Literal["hra"] = "hra"
    """The PEFT method."""
    r: Count = 8
    """Number of reflections; an even number starts from the base."""
    gram_schmidt: bool = False
    """Make the reflections orthogonal to each other."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of the reflections' normals."""
        return self.r * columns
