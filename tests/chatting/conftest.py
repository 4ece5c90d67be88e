from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.chatting.session import ChatSession
from edgetune.runtime import Runtime, Sampling, load
from edgetune.runtime.engine import Engine
from tests.converters import tiny
from tests.export_requests import export
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
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(directory / "hf"), directory / "endless.gguf")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF adapter for the model; beside it merged.gguf, the model with it."""
    directory = tmp_path_factory.mktemp("adapter")
    tiny.adapter(base, directory / "adapter")
    export(base, {}, lora={"f32": directory / "change.gguf"}, adapter=directory / "adapter")
    export(base, {"f32": directory / "merged.gguf"}, adapter=directory / "adapter")
    return directory / "change.gguf"


@pytest.fixture(scope="session", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, file: Path, folder: Path) -> Path:
    return file if request.param == "gguf" else folder


@pytest.fixture(scope="session")
def engine(artifact: Path) -> Iterator[Engine]:
    with load(artifact) as runtime, Engine(runtime, slots=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def alone(artifact: Path) -> Iterator[Runtime]:
    """The model without a cache of earlier requests."""
    with load(artifact) as runtime:
        yield runtime


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    return ChatSession(engine, Sampling(), max_tokens=8)
