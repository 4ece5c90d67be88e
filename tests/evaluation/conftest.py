"""A trained tiny run with its exported files, made once; what `datasets` caches goes to a temporary folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.runs.directory import RunDirectory
from tests.cli_runner import edgetune
from tests.training import runs

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("base") / "hf", "float32")


@pytest.fixture(scope="session")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run on an unquantized base, exported to f32 and q8_0 GGUF and to f32 ONNX."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = runs.settings(base, folder, max_steps=12) | {
        "name": "lamp", "quantization": {"bits": 16, "compute_dtype": "float32"},
        "export": {"types": ["f32", "q8_0"]},
    }  # fmt: skip
    path = folder / "run"
    for command in (
        ("train", runs.write_config(folder / "config.yaml", settings), "-o", path),
        ("merge-export", path),
        ("merge-export", path, "--format", "onnx", "-q", "f32"),
    ):
        result = edgetune(*command)
        assert result.returncode == 0, result.stderr.decode()
    return RunDirectory.open(path)


@pytest.fixture(scope="session")
def file(run: RunDirectory) -> Path:
    return run.artifacts / "lamp-f32.gguf"
