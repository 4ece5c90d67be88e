"""Atomic writes: old or new, never a part."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune_converters.files import atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    atomic.write_text(path, "old")
    with atomic.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "\ud800")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_characters_that_utf_8_lacks_can_be_replaced(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.txt", "a\ud800", errors="replace")
    assert (tmp_path / "a.txt").read_text() == "a?"


def test_a_temporary_directory_starts_empty_and_is_always_removed(tmp_path: Path) -> None:
    stale = tmp_path / "model.partial" / "of a killed process"
    stale.mkdir(parents=True)
    with atomic.temporary_directory(tmp_path / "model") as directory:
        assert directory == stale.parent
        assert not list(directory.iterdir())
        (directory / "file").touch()
    with pytest.raises(ZeroDivisionError), atomic.temporary_directory(tmp_path / "model", ".tune.partial") as directory:
        directory.with_name(str(1 / 0))
    assert not list(tmp_path.iterdir())
