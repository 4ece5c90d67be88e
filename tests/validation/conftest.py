from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.runs.directory import RunDirectory
from tests.runtime import models
from tests.validation.runs import make_run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.base(tmp_path_factory.mktemp("validation") / "hf")


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The f32 file that is the reference."""
    return models.gguf(base, tmp_path_factory.mktemp("whole") / "tiny-f32.gguf")


@pytest.fixture(scope="session")
def coarse(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gguf(base, tmp_path_factory.mktemp("coarse") / "tiny-q4_0.gguf", "q4_0")


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with which importing torch is an error."""
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "torch.py").write_text("raise ImportError('torch is not to be imported here')\n")
    return str(folder)


@pytest.fixture(scope="session")
def run(base: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("run") / "run", base, whole)
