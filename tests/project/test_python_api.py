"""docs/python.md: its samples run, and the package stays light."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import edgetune
from tests.converters import tiny
from tests.export_requests import export
from tests.runtime import models

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)


def samples(*titles: str) -> list[str]:
    """The code of some sections in their order, or of all."""
    chosen = [section for section in SECTIONS if not titles or section.startswith(titles)]
    return [code for section in chosen for code in re.findall(r"```python no-run\n(.*?)```", section, re.DOTALL)]


def run_samples(codes: list[str]) -> dict[str, Any]:
    """One after another in one namespace; every name that a sample uses is defined by one before it."""
    names: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, "docs/python.md", "exec"), names)
    return names


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return models.gguf(models.base(tmp_path / "base"), tmp_path / "model.gguf")


@pytest.fixture
def adapter(model: Path) -> Path:
    base, path = model.parent / "base", model.parent / "mine.gguf"
    export(base, {}, lora={"f32": path}, adapter=tiny.adapter(base, model.parent / "adapter"))
    return path


@pytest.mark.usefixtures("model", "adapter")
def test_the_samples_that_need_no_run_directory_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        names = run_samples(samples("Run a model", "Lower-level packages", "Errors and notices"))
    assert (tmp_path / "base-q8_0.gguf").is_file()
    assert names["text"]
    assert names["reply"]
    assert names["second"]
    assert names["adapted"] != names["first"]
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert printed.count("of at most 16 tokens") == 3
    assert "similarity 0." in printed
    assert "log-probability -" in printed
    assert re.search(r"choice (on|off)\n", printed)
    assert "there is no file missing.gguf" in printed


@pytest.mark.usefixtures("model")
def test_the_samples_from_training_to_validation_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    from edgetune.training import environment
    from tests.training import runs

    with environment.silence_libraries():
        values = runs.settings(runs.make_base(tmp_path / "trained"), tmp_path)
    runs.write_config(tmp_path / "config.yaml", values)
    with environment.silence_libraries():
        names = run_samples(["import edgetune", *samples("Train", "Export", "Validate")])
    assert names["run"].is_finished
    (receipt,) = names["receipts"]
    assert Path(receipt.artifact).is_file()
    (rung,) = names["results"].files
    assert rung.figures.kld.value < 0.05
    assert Path(receipt.artifact).name in capsys.readouterr().out


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Nothing but the standard library, which the finder of an editable installation may need."""
    code = "import sys; before = set(sys.modules); import edgetune; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in result.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"edgetune"}


@pytest.mark.usefixtures("model")
def test_opening_a_file_imports_nothing_that_only_export_and_training_need() -> None:
    code = "import sys, edgetune; edgetune.load('model.gguf').close(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "edgetune.runtime.llama.runtime" in loaded
    assert not loaded & {
        *("torch", "pydantic", "onnx", "onnxruntime", "tokenizers", "transformers", "rich", "click", "asyncio"),
        *("edgetune.config", "edgetune.runs.manifest", "edgetune_converters.architectures"),
        *("edgetune_converters.adapters.adapter", "edgetune_converters.reading.checkpoint"),
    }


@pytest.mark.parametrize("name", edgetune.__all__)
def test_every_public_name_exists_and_has_documentation(name: str) -> None:
    assert name in dir(edgetune)
    assert getattr(edgetune, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'tune'"):
        edgetune.tune  # noqa: B018


def test_only_training_needs_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported')")
    code = "import edgetune; print([getattr(edgetune, name) for name in edgetune.__all__])"
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
