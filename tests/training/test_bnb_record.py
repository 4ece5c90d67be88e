"""What training records of its 4-bit base, and that the export arrives at the model that was trained with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli
from edgetune.runs.directory import RunDirectory
from edgetune.runs.json_format import write_json
from edgetune.training import bnb_record
from tests.converters import test_merge_base, tiny
from tests.export_requests import export
from tests.training import runs


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("quantized")
    config = runs.write_config(folder / "config.yaml", runs.settings(base, folder, max_steps=6))
    assert cli.run(["train", str(config), "-o", str(folder / "run")]) == 0
    return RunDirectory.open(folder / "run")


def exported(run: RunDirectory, merge_base: str) -> dict[str, Any]:
    """The figures of `edgetune validate` on the f32 file."""
    file = run.path.parent / f"{merge_base}.gguf"
    arguments = ["merge-export", str(run.path), "-q", "f32", "-o", str(file), "--merge-base", merge_base, "--overwrite"]
    assert cli.run(arguments) == 0
    receipt = json.loads(file.with_name(file.name + ".receipt.json").read_text())
    assert receipt["merge_base"] == merge_base
    assert receipt["notes"] == []
    report = file.with_suffix(".json")
    assert cli.run(["validate", str(run.path), str(file), "--json", str(report), "--gate", "recovery_min=-1000"]) == 0
    rungs: list[dict[str, Any]] = json.loads(report.read_text())["rungs"]
    figures: dict[str, Any] = rungs[-1]["figures"]
    return figures


def test_every_layer_is_recorded(run: RunDirectory) -> None:
    record = run.manifest.quantized
    assert record is not None
    (group,) = record["groups"]
    assert (record["device"], record["misread"], group["dtype"], group["blocksize"]) == ("cpu", [], "float32", 64)
    assert len(group["tensors"]) == 7 * 2
    assert "model.layers.0.self_attn.q_proj.weight" in group["tensors"]


def test_the_file_on_the_trained_base_is_the_trained_model(run: RunDirectory) -> None:
    nf4, original = (exported(run, merge_base)["kld"]["value"] for merge_base in ("nf4", "original"))
    print(nf4, original)
    assert nf4 < 1e-5
    assert original > 20 * nf4


def test_the_choice_of_the_configuration_is_the_default(run: RunDirectory, tmp_path: Path) -> None:
    from edgetune.exporting.options import resolve_options
    from edgetune.exporting.source import find_source

    manifest = run.manifest.content()
    manifest["config"]["export"]["merge_base"] = "nf4"
    write_json(tmp_path / "run.json", manifest)
    assert resolve_options(find_source(tmp_path).export_section, {}).merge_base == "nf4"
    del manifest["config"]["export"]["merge_base"], manifest["quantized"]
    write_json(tmp_path / "run.json", manifest)
    source = find_source(tmp_path)
    assert (resolve_options(source.export_section, {}).merge_base, source.bnb_record) == ("original", None)


def test_weights_that_bitsandbytes_misreads_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On CPUs with AVX-512 bitsandbytes takes wrong scales for rows of 96; elsewhere there is nothing to say."""
    base = tiny.base("llama-tied", tmp_path / "base")
    record = bnb_record.record_quantized_weights(test_merge_base.load(base, "bfloat16"))
    said = capfd.readouterr().err
    assert ("misreads" in said) == bool(record["misread"])
    if not record["misread"]:
        pytest.skip("bitsandbytes is right on this machine")
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, merge_base="nf4", bnb_record=record)
    assert any(f"bitsandbytes misread {len(record['misread'])} weights" in note for note in receipt.notes)
