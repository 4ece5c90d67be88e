from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.runs.directory import RunDirectory
from tests.runtime import models
from tests.validation.runs import make_run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.base(tmp_path_factory.mktemp("commands") / "hf")


@pytest.fixture(scope="session")
def file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gguf(base, tmp_path_factory.mktemp("file") / "tiny-f32.gguf")


@pytest.fixture(scope="session")
def run_directory(base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: RunDirectory = make_run(tmp_path_factory.mktemp("run") / "run", base, file)
    return run.path


@pytest.fixture(params=["truncated", "foreign", "empty", "missing"])
def bad(request: pytest.FixtureRequest, file: Path, tmp_path: Path) -> Path:
    """Files that are not whole GGUF files."""
    contents = {"truncated": file.read_bytes()[:100_000], "foreign": b"PK\x03\x04" + bytes(500), "empty": b""}
    if request.param in contents:
        (tmp_path / "bad.gguf").write_bytes(contents[request.param])
    return tmp_path / "bad.gguf"
