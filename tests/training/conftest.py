"""One tiny base for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from edgetune.training import environment
from tests.training import runs


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """As the training command does: third-party warnings are not ours to mend."""
    with environment.silence_libraries():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("base"))
