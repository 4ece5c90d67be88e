from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.runtime import Runtime, load
from tests.runtime import models


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.base(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="session")
def file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gguf(base, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf")


@pytest.fixture(scope="session")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-f32")


@pytest.fixture(scope="session")
def portable(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Standard operators alone: the cache grows from call to call."""
    return models.onnx(base, tmp_path_factory.mktemp("portable") / "tiny-f32", portable=True)


@pytest.fixture(scope="session")
def artifacts(file: Path, folder: Path, portable: Path) -> dict[str, Path]:
    return {"gguf": file, "onnx": folder, "portable": portable}


@pytest.fixture(scope="session", params=["gguf", "onnx", "portable"])
def artifact(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Path:
    """The same model in f32 for every runtime."""
    return artifacts[request.param]


@pytest.fixture
def runtime(artifact: Path) -> Iterator[Runtime]:
    with load(artifact) as opened:
        yield opened
