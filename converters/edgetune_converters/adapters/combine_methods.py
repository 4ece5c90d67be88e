"""The table of ways to combine adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CombineMethod:
    """What a way to combine adapters does."""

    prunes: bool = False
    """Whether values are set to zero, so that a density is needed."""
    at_random: bool = False
    """Whether the pruned values are drawn, so that there is a seed; else they are the smallest."""
    by_majority: bool = False
    """Whether a value is the mean of those with the sign of the majority; else a sum."""
    lowers_rank: bool = False
    """Whether products of B and A are combined, of which singular values make a pair of a given rank."""
    pairs_alone: bool = True
    """Whether only adapters of LoRA are combined."""


_PRUNING: Mapping[str, CombineMethod] = {
    "ties": CombineMethod(prunes=True, by_majority=True),
    "dare-linear": CombineMethod(prunes=True, at_random=True),
    "dare-ties": CombineMethod(prunes=True, at_random=True, by_majority=True),
    "magnitude-prune": CombineMethod(prunes=True),
}
COMBINE_METHODS: Mapping[str, CombineMethod] = {
    "linear": CombineMethod(pairs_alone=False),
    "cat": CombineMethod(),
    "svd": CombineMethod(lowers_rank=True),
    **_PRUNING,
    **{f"{name}-svd": replace(method, lowers_rank=True) for name, method in _PRUNING.items()},
}
"""`CombineName` -> what it does."""
