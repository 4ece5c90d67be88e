"""Fewer cases than the full product of independent axes: every pair of values of every two axes, in some case."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

import pytest


def pairwise(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize a test by cases that together hold every pair of values of every two axes."""
    return pytest.mark.parametrize(tuple(axes), covering([list(values) for values in axes.values()]))


def covering(axes: list[list[object]]) -> list[tuple[object, ...]]:
    """Return cases that hold every pair: greedily, the case with the most new pairs first; the first one on a tie."""
    cases = list(product(*(range(len(values)) for values in axes)))
    missing = set().union(*map(_pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(values[at] for values, at in zip(axes, case, strict=True)) for case in sorted(chosen)]


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(combinations(enumerate(case), 2))
