from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from edgetune.serving.calls import Server, ServerSettings
from edgetune.serving.loaded_files import LoadSettings, ModelPool, served_files, with_adapters
from edgetune.serving.server import ListenSettings, bind, make_uvicorn, url_of
from tests.runtime import models


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.base(tmp_path_factory.mktemp("served") / "hf", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gguf(base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never stops by itself."""
    folder = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(folder / "hf"), folder / "endless.gguf")


@pytest.fixture(scope="session")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-onnx")


class Running:
    """A server in a thread."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.v1 = url + "/v1"
        self.port = int(url.rpartition(":")[2])


@contextmanager
def running(
    *files: str | Path, settings: ServerSettings | None = None, open_model: Any = None, adapters: Sequence[str] = (),
    **load: Any,
) -> Iterator[Running]:  # fmt: skip
    """Serve files on a free port until the end of the context."""
    served = with_adapters(served_files([*map(str, files)]), adapters)
    pool = ModelPool(served, LoadSettings(threads=1, **load), open_model)
    server = Server(pool, settings or ServerSettings())
    listening = bind(ListenSettings(port=0))
    uvicorn = make_uvicorn(server, shutdown_seconds=1.0)
    thread = threading.Thread(target=lambda: asyncio.run(uvicorn.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield Running(server, url_of(listening))
    finally:
        uvicorn.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(file: Path, folder: Path, endless: Path) -> Iterator[Running]:
    """A server with a GGUF file, an ONNX folder, and a model that never stops."""
    with running(file, folder, endless) as server:
        yield server


@pytest.fixture(params=["tiny", "tiny-onnx"])
def model(request: pytest.FixtureRequest) -> str:
    """The same model in both formats."""
    name: str = request.param
    return name


def openai_client(server: Running) -> Any:
    """Return OpenAI's client of a server; without its types, which a test breaks on purpose."""
    return OpenAI(base_url=server.v1, api_key="none", max_retries=0)


@pytest.fixture
def client(live: Running) -> Iterator[Any]:
    """OpenAI's client."""
    with openai_client(live) as opened:
        yield opened


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
