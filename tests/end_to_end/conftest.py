"""One short but real run of the sample, made once: real NF4 training, real export, for the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.end_to_end.cli_runner import edgetune, edgetune_process, short_run


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("main-line") / "run"
    result = edgetune_process(*short_run(path))
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def artifact(run_directory: Path) -> Path:
    result = edgetune("merge-export", run_directory, "-q", "q4_k_m,q8_0")
    assert result.returncode == 0, result.stderr
    return run_directory / "artifacts/smart-home-q4_k_m.gguf"


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which importing torch, or what needs it, is an error."""
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'peft', 'bitsandbytes', 'trl', 'accelerate'}:\n"
        "            raise ImportError(f'{name} is not to be imported here')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
