"""OSF: the lesser singular directions of the base (arXiv:2504.07097)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import THROUGH_PEFT, Count, Facts, PerLayerMethod


class Osf(PerLayerMethod):
    """OSF: the lesser singular directions are trained, and the greater ones kept (arXiv:2504.07097)."""

    facts: ClassVar[Facts] = Facts(
        "OSF", "arXiv:2504.07097", "reparametrized", "OSF",
        not_on=dict.fromkeys((4, 8), "its start is a singular value decomposition of unpacked weights"),
        no_low_rank=THROUGH_PEFT,
    )  # fmt: skip
    starts_from_base: ClassVar[bool] = True
    takes_transposed: ClassVar[bool] = False

    kind: Literal["osf"] = "osf"
    """The PEFT method."""
    effective_rank: Count | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Singular directions that are kept: a number, or a share of the smaller side. Default: half."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.modules_to_save:
            yield "adapter.modules_to_save has no effect with OSF; leave it out"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of the trained singular vectors and values."""
        smaller = min(rows, columns)
        kept = 0.5 if self.effective_rank is None else self.effective_rank
        rank = smaller - (int(smaller * kept) if isinstance(kept, float) else min(kept, smaller))
        return rank * (rows + columns + 1)
