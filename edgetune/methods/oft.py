"""OFT: the rows of the base are rotated in blocks (arXiv:2306.07280)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Count, Dropout, Facts, PerLayerMethod, Positive


class Oft(PerLayerMethod):
    """OFT: the inputs of each layer are rotated in blocks by an orthogonal matrix (arXiv:2306.07280)."""

    facts: ClassVar[Facts] = Facts(
        "OFT", "arXiv:2306.07280", "reparametrized", "OFT",
        no_low_rank="a rotation of the base has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"block_size": "oft_block_size", "dropout": "module_dropout"}
    used_with: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "eps": ("coft", True),
        "num_cayley_neumann_terms": ("use_cayley_neumann", True),
    }

    kind: Literal["oft"] = "oft"
    """The PEFT method."""
    block_size: Annotated[int, Field(ge=2)] = 32
    """Inputs that are rotated together; if it does not divide the inputs of a layer, the nearest divisor is taken."""
    dropout: Dropout = 0.0
    """Probability to leave a block unrotated during training."""
    coft: bool = False
    """Keep each rotation within `eps` of the identity."""
    eps: Positive = 6e-5
    """The limit of `coft`."""
    block_share: bool = False
    """All blocks of a layer share one rotation."""
    use_cayley_neumann: bool = True
    """Approximate the Cayley transform by a Neumann series, which needs no inverse."""
    num_cayley_neumann_terms: Count = 5
    """Terms of the series."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the skew-symmetric blocks."""
        size = _nearest_divisor(columns, self.block_size)
        blocks = 1 if self.block_share else columns // size
        return blocks * (size * (size - 1) // 2)


def _nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of a number that is nearest to the wanted one, as PEFT chooses it."""
    if number % wanted == 0:
        return wanted
    if wanted > number:
        return number
    higher = next(each for each in range(wanted, number + 1) if number % each == 0)
    lower = next(each for each in range(wanted, 0, -1) if number % each == 0)
    return lower if wanted - lower <= higher - wanted else higher
