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


@pytest.fixture
def runtime(file: Path) -> Iterator[Runtime]:
    with load(file) as opened:
        yield opened
