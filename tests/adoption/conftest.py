"""A tiny base, an adapter of PEFT for it, and held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from edgetune.training import environment
from tests.converters import tiny
from tests.training import runs


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with environment.silence_libraries():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("adoption") / "tiny-llama", "float32")


@pytest.fixture(scope="session")
def lora(base: Path) -> Path:
    """A strong adapter, so that its effect is not lost among errors."""
    with environment.silence_libraries():
        return tiny.adapter(base, base.parent / "lora", target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=64)


@pytest.fixture(scope="session")
def rows(base: Path) -> Path:
    return runs.write_rows(base.parent / "held-out.jsonl", 24)
