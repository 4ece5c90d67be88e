"""A GPTQ, AWQ or compressed-tensors base is dequantized, held in NF4 and trained as the same weights unquantized."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetune import cli
from edgetune.runs.directory import RunDirectory
from edgetune.training import environment
from edgetune_converters.gguf import reader
from tests.converters.quantized_checkpoints import ENTRIES, quantized
from tests.training import runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("base") / "base", "float32")


def _edgetune(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert not done.value.code


def _trained(base: Path, folder: Path) -> RunDirectory:
    folder.mkdir()
    config = runs.write_config(folder / "config.yaml", runs.settings(base, folder))
    _edgetune(["train", str(config), "-o", str(folder / "run")])
    return RunDirectory(folder / "run")


def _adapter(run: RunDirectory) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def _exported(run: RunDirectory, merge_base: str) -> dict[str, bytes]:
    file = run.path.with_name(f"{merge_base}.gguf")
    _edgetune(["merge-export", str(run.path), "-q", "f32", "--merge-base", merge_base, "-o", str(file)])
    found = reader.read(file)
    return {entry.name: np.asarray(found.tensor(entry.name)).tobytes() for entry in found.tensors}


def test_training_and_both_merges_are_those_of_the_plain_weights(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = quantized(base, tmp_path, "gptq")
    capsys.readouterr()
    one, other = _trained(packed, tmp_path / "one"), _trained(plain, tmp_path / "other")
    said = capsys.readouterr()
    assert "weights of the base are quantized (gptq) and were dequantized" in (said.out + said.err).replace("\n", " ")
    assert _adapter(one) == _adapter(other)
    for merge_base in ("original", "nf4"):
        assert _exported(one, merge_base) == _exported(other, merge_base)
    assert not [path.name for path in one.path.iterdir() if "tmp" in path.name or "partial" in path.name]


@pytest.mark.parametrize("method", [name for name in ENTRIES if name != "gptq"])
def test_a_dry_run_takes_the_base(method: str, base: Path, tmp_path: Path) -> None:
    packed, _ = quantized(base, tmp_path, method)
    config = runs.write_config(tmp_path / "config.yaml", runs.settings(packed, tmp_path))
    _edgetune(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"])
    assert not (tmp_path / "run").exists()


def test_the_record_names_the_base_as_it_is_stored(base: Path, tmp_path: Path) -> None:
    packed, _ = quantized(base, tmp_path, "awq")
    run = _trained(packed, tmp_path / "one")
    manifest = json.loads((run.path / "run.json").read_text())
    assert set(manifest["base"]["files"]) == {"config.json", "model.safetensors"}
    assert manifest["base"]["path"] == str(packed)
