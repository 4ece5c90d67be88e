"""A place that cannot be written is refused for that reason before any work, and a full disk for its size."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from edgetune.errors import EnvironmentProblem
from edgetune.planning.disk import check_free_space
from edgetune_converters.files.writable import why_not_writable


def test_a_read_only_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuses)
    with pytest.raises(EnvironmentProblem) as caught:
        check_free_space(tmp_path / "runs" / "mine", 2**60)
    assert caught.value.message == f"{tmp_path / 'runs/mine'} cannot be written: {tmp_path}: read-only file system"
    assert caught.value.hint == "Write elsewhere with -o"


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"file/run cannot be written: .*file is a file"):
        check_free_space(tmp_path / "file" / "run", 1)


def test_a_full_disk_is_told_by_its_size(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"needs about \d+ MiB, and its disk has \d+ MiB free"):
        check_free_space(tmp_path / "run", 2**60)


def test_the_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
