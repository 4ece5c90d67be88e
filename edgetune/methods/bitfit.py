"""BitFit: the biases are trained (arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Facts
from edgetune.methods.selective import NO_LOW_RANK, SelectiveMethod


class BitFit(SelectiveMethod):
    """BitFit: the biases of the base are trained; a base without any gets new ones (arXiv:2106.10199)."""

    facts: ClassVar[Facts] = Facts(
        "BitFit",
        "arXiv:2106.10199",
        "selective",
        None,
        not_as={"gguf-lora": NO_LOW_RANK},
    )

    kind: Literal["bitfit"] = "bitfit"
    """The method."""
    added_to: Literal["auto", "none"] | list[str] = "auto"
    """Linear layers that get a bias: `auto`, of a base without biases all for which `export.formats` have a place;
    `none`; or names such as [q_proj, v_proj]."""

    def count_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of biases, as if every matrix and every norm had one."""
        return sum(shape[0] for shape in shapes.values() if len(shape) <= 2)
