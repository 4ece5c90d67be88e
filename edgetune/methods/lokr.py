"""LoKr: the Kronecker product of two small matrices (arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, Layers, Positive, of_pattern


class LoKr(LayerMethod):
    """LoKr: the update is the Kronecker product of two small matrices (arXiv:2309.14859)."""

    facts: ClassVar[Facts] = Facts(
        "LoKr", "arXiv:2309.14859", "reparametrized", "LOKR",
        not_on={4: "PEFT's layer adds its update to the packed weights"},
        no_low_rank="a Kronecker product has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"factor": "decompose_factor"}

    kind: Literal["lokr"] = "lokr"
    """The PEFT method."""
    r: Count = 8
    """Rank of the factors that are large enough to be decomposed."""
    alpha: Positive = 8
    """The update is scaled by alpha / r."""
    factor: int = -1
    """Rows and columns of the first matrix, if they divide those of the layer; -1: about the square root."""
    decompose_both: bool = False
    """Decompose the first matrix too."""
    rank_dropout_scale: bool = False
    """Scale the update up by what `rank_dropout` leaves out."""
    rank_dropout: Dropout = 0.0
    """Dropout of ranks during training."""
    module_dropout: Dropout = 0.0
    """Probability to leave out a layer's update during training."""
    rank_pattern: dict[str, Count] = {}
    """Ranks by the end of the layer's name, or by a regular expression."""
    alpha_pattern: dict[str, Positive] = {}
    """Alphas in the same way."""

    def unused_options(self) -> Iterator[str]:
        """Yield the options that have no effect beside the others."""
        yield from super().unused_options()
        if self.rank_dropout_scale and not self.rank_dropout:
            yield (
                "adapter.rank_dropout_scale is true, and adapter.rank_dropout leaves out no ranks; set "
                "adapter.rank_dropout above 0, or leave out adapter.rank_dropout_scale"
            )

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.factor != -1 and self.factor < 1:
            yield f"adapter.factor is {self.factor}: give 1 or more, or -1 for about the square root of each side"

    def count_trainable(self, layers: Layers) -> int:
        """Return the parameters of both matrices for each layer."""
        return sum(self._count(of_pattern(self.rank_pattern, name, self.r), *shape) for name, shape in layers.items())

    def _count(self, rank: int, rows: int, columns: int) -> int:
        (rows_1, rows_2), (columns_1, columns_2) = _divide(rows, self.factor), _divide(columns, self.factor)
        first, second = rows_1 * columns_1, rows_2 * columns_2
        if self.decompose_both and rank < max(rows_1, columns_1) / 2:
            first = rank * (rows_1 + columns_1)
        if rank < max(rows_2, columns_2) / 2:
            second = rank * (rows_2 + columns_2)
        return first + second


def _divide(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`: the first is `factor`, or as near the square root as possible."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    smaller = max(each for each in range(1, size + 1) if size % each == 0 and each * each <= size and each <= limit)
    return smaller, size // smaller
