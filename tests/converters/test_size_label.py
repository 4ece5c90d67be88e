"""`general.size_label` against the functions of llama.cpp's own gguf package."""

from __future__ import annotations

import gguf
import pytest
from gguf.utility import size_label as counted
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters.provenance.size_label import format_count, size_label

_PARTS = (
    "Llama",
    "3.2",
    "1B",
    "1b",
    "7b1",
    "0_5B",
    "8x7B",
    "30B",
    "A3B",
    "128K",
    "v1",
    "Instruct",
    "small",
    "XL",
    "q4",
)


@given(st.one_of(st.integers(1, 10**13), st.sampled_from([999, 1000, 10**6, 10**6 + 1, 10**9, 10**12, 10**12 + 1])))
def test_counts_are_rounded_as_there(count: int) -> None:
    assert format_count(count) == counted(count, count, 0, 0)


@given(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=5), st.integers(10**5, 10**12))
def test_sizes_in_names_are_those_that_it_finds(parts: list[str], total: int) -> None:
    name = "-".join(parts)
    theirs = gguf.Metadata.get_model_id_components(name, total)[-1]
    assert size_label(name, [("x", (total,))]) == (theirs or counted(total, total, 0, 0))


@pytest.mark.parametrize(
    ("name", "tensors", "label"),
    [
        ("assistant", [("token_embd.weight", (128256, 2048)), ("blk.0.ffn_up.weight", (973_144_064,))], "1.2B"),
        ("x", [("blk.0.ffn_up_exps.weight", (8, 1000, 5_000_000)), ("output.weight", (2_000_000_000,))], "8x7.0B"),
        ("x", [("blk.0.ffn_up_exps.weight", (8, 10, 1000)), ("blk.0.ffn_up_exps.bias", (8, 10))], "8x10K"),
    ],
)
def test_what_is_counted(name: str, tensors: list[tuple[str, tuple[int, ...]]], label: str) -> None:
    assert size_label(name, tensors) == label
