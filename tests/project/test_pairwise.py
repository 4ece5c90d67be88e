"""The choice of cases from independent axes."""

from __future__ import annotations

from itertools import combinations

from tests.pairwise import covering


def test_every_pair_of_values_is_in_some_case_and_cases_are_few() -> None:
    axes: list[list[object]] = [["f32", "f16", "bf16"], ["nf4", "fp4"], [32, 64, 128, 256], [False, True]]
    cases = covering(axes)
    for first, second in combinations(range(len(axes)), 2):
        found = {(case[first], case[second]) for case in cases}
        assert found == {(one, other) for one in axes[first] for other in axes[second]}
    assert len(cases) <= 14  # of 48; the two largest axes have 12 pairs


def test_two_axes_are_the_full_product() -> None:
    assert covering([[1, 2], ["a", "b"]]) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
