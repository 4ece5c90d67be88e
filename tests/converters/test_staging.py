"""A staged directory: complete under its name, or not there at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edgetune_converters.errors import EdgetuneError
from edgetune_converters.outputs.base import OutputSummary
from edgetune_converters.outputs.staging import DirectoryKind, DirectoryOutput, StagedDirectory
from edgetune_converters.provenance.hashing import InputHashes

MARKED = DirectoryKind("a marked directory", lambda path: (path / "mark").is_file())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_published_directory_has_its_name_and_the_hash_of_each_file(tmp_path: Path) -> None:
    (tmp_path / "m.partial" / "of a killed export").mkdir(parents=True)
    with StagedDirectory(tmp_path / "m", MARKED) as staged:
        assert not list(staged.partial.iterdir())
        (staged.partial / "deep").mkdir()
        (staged.partial / "deep" / "b").write_bytes(b"b")
        (staged.partial / "a").write_bytes(b"a")
        staged.hashes["a"] = "known beforehand"
        staged.hash_all()
        assert not (tmp_path / "m").exists()
        staged.publish()
    assert staged.hashes == {"a": "known beforehand", "deep/b": digest(b"b")}
    assert {path.name for path in tmp_path.iterdir()} == {"m"}
    assert (tmp_path / "m" / "a").read_bytes() == b"a"


def test_a_directory_that_is_not_published_leaves_nothing_and_keeps_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mark").touch()
    with StagedDirectory(tmp_path / "m", MARKED) as staged:
        (staged.partial / "a").touch()
    with pytest.raises(ZeroDivisionError), StagedDirectory(tmp_path / "m", MARKED) as staged:
        (staged.partial / str(1 / 0)).touch()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mark"]


@pytest.mark.parametrize("marked", [True, False], ids=["exported", "foreign"])
def test_only_an_exported_directory_is_replaced(tmp_path: Path, marked: bool) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ("mark" if marked else "thesis.txt")).touch()
    with StagedDirectory(tmp_path / "m", MARKED) as staged:
        (staged.partial / "new").touch()
        if marked:
            staged.publish()
        else:
            with pytest.raises(EdgetuneError, match="was not made by an export: it is not replaced"):
                staged.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["new" if marked else "thesis.txt"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file")
    with pytest.raises(EdgetuneError, match=r"m is a file; a marked directory is a directory"):
        MARKED.check_replaceable(tmp_path / "m")


class Unopenable(DirectoryOutput):
    """Fails when its files are opened, as on a full disk."""

    size = 0

    def _open_files(self) -> None:
        (self.partial / "first").touch()
        raise OSError(28, "No space left on device")

    def finish(self, inputs: InputHashes) -> None:
        raise NotImplementedError

    def verify(self) -> None:
        raise NotImplementedError

    def _summary(self) -> OutputSummary:
        raise NotImplementedError


def test_files_that_cannot_be_opened_leave_no_directory(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        Unopenable(tmp_path / "m", MARKED).__enter__()
    assert not list(tmp_path.iterdir())
