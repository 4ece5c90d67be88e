"""The tiny base of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from edgetune.training import environment
from tests.training import runs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("base"))
