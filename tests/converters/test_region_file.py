"""The file that is written here and there: its bytes, its hash whatever the order, and what cannot be."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune_converters.files.region_file import Region, RegionFile
from tests.profiles import scaled

GAP = 4096


@settings(max_examples=scaled(0.5))
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 200)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_bytes_and_hash_in_any_order(tmp_path: Path, shapes: list[tuple[int, int, int]], seed: int) -> None:
    """Regions of rows that several write in turn (`step` of them), in an order that is drawn."""
    rng = np.random.default_rng(seed)
    starts = [GAP * 8 * at for at in range(len(shapes))]
    size = starts[-1] + GAP * 9
    wanted = np.zeros(size, np.uint8)
    parts: list[tuple[int, NDArray[np.uint8], int, int]] = []
    for start, (rows, step, width) in zip(starts, shapes, strict=True):
        own = rng.integers(0, 256, (rows * step, width), np.uint8)
        wanted[start : start + own.size] = own.reshape(-1)
        parts += [(start, np.ascontiguousarray(own[at::step]), start + at * width, step) for at in range(step)]
    path = tmp_path / f"placed-{len(list(tmp_path.iterdir()))}"
    regions = [Region(start, rows * step * width) for start, (rows, step, width) in zip(starts, shapes, strict=True)]
    file = RegionFile(path, size, regions)
    try:
        for at in rng.permutation(len(parts)):
            file.write(*parts[at])
        assert file.finish() == hashlib.sha256(wanted.tobytes()).hexdigest()
    finally:
        file.close()
    assert path.read_bytes() == wanted.tobytes()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    file = RegionFile(path, 2 * GAP, [Region(0, GAP), Region(GAP, GAP)])
    try:
        os.truncate(path, GAP)
        with pytest.raises(OSError, match="shorter than what was written"):
            file.finish()
    finally:
        file.close()
    file.close()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"here")
    with pytest.raises(FileExistsError):
        RegionFile(tmp_path / "data", GAP, [])
    assert (tmp_path / "data").read_bytes() == b"here"
