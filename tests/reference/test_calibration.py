"""The training rows that a run keeps for importance matrices."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow
from edgetune.errors import RunDirectoryError
from edgetune.reference.calibration import CalibrationRows


def _encoded(lengths: list[int]) -> EncodedRows:
    ids = iter(range(sum(lengths)))
    return EncodedRows(EncodedRow([next(ids) for _ in range(length)], [True] * length) for length in lengths)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 60), st.integers(1, 60))
def test_whole_rows_are_chosen_until_there_are_enough(lengths: list[int], most: int, wanted: int) -> None:
    rows = _encoded(lengths)
    chosen = CalibrationRows.choose(rows, most)
    parts = [part.tolist() for part in np.split(chosen.ids, chosen.ends[:-1])] if len(chosen.ends) else []
    known = [row.input_ids for row in rows]
    assert all(part in known for part in parts)
    assert len(chosen.ids) == rows.tokens if rows.tokens < most else len(chosen.ids) - len(parts[-1]) < most
    assert len({tuple(part) for part in parts if part}) == sum(1 for part in parts if part)
    first = list(chosen.first(wanted))
    assert np.concatenate([*first, chosen.ids[:0]]).tolist() == chosen.ids[:wanted].tolist()
    assert all(len(row) for row in first)


def test_the_choice_is_the_same_each_time_and_from_the_whole_split() -> None:
    rows = _encoded([5] * 100)
    chosen = CalibrationRows.choose(rows, 50)
    assert chosen.digest == CalibrationRows.choose(rows, 50).digest
    assert chosen.ids.max() > 250


def test_the_file_gives_the_rows_back(tmp_path: Path) -> None:
    chosen = CalibrationRows.choose(_encoded([3, 0, 4]))
    chosen.write(tmp_path / "calibration.npz")
    assert CalibrationRows.read(tmp_path / "calibration.npz").digest == chosen.digest


@pytest.mark.parametrize(
    ("ids", "ends"), [([1, 2, 3], [2]), ([1, 2, 3], [4]), ([1, 2, 3], [3, 2, 3]), ([1.5], [1]), ([[1, 2]], [2])]
)
def test_a_damaged_file_is_named(ids: list[float], ends: list[int], tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    array = np.array(ids)
    np.savez(path, ids=array.astype(np.int32) if array.dtype.kind == "i" else array, ends=np.array(ends, np.int64))
    with pytest.raises(RunDirectoryError, match=r"calibration\.npz is damaged"):
        CalibrationRows.read(path)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(noise: bytes, place: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.npz"
        CalibrationRows.choose(_encoded([3, 4])).write(path)
        data = bytearray(path.read_bytes())
        data[place : place + len(noise)] = noise
        path.write_bytes(data)
        with contextlib.suppress(RunDirectoryError):
            CalibrationRows.read(path)
