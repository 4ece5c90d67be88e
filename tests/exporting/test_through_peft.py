"""Adapters that the converters cannot merge are merged by PEFT first; receipts name the adapter, not its layers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.config import parse_config
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.exporting.run import prepare_export
from edgetune.exporting.source import find_source
from edgetune.validation.provenance import mismatches
from edgetune_converters.adapters.directory import find_adapter
from edgetune_converters.adapters.kinds import THROUGH_PEFT
from edgetune_converters.errors import AdapterError
from edgetune_converters.gguf import reader as gguf_reader
from tests.converters import tiny
from tests.converters.peft_methods import Method, adapter, merged_by_peft

safetensors_torch: Any = pytest.importorskip("safetensors.torch")

METHODS = {
    "psoft": Method("PsoftConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "tinylora": Method("TinyLoraConfig", {"r": 2, "u": 8}),
    "unilora": Method("UniLoraConfig", {"r": 4, "theta_d_length": 64}),
    "osf": Method("OSFConfig", {"effective_rank": 20, "target_modules": ["q_proj", "v_proj"]}),
    "frod": Method("FrodConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "waveft-sym4": Method("WaveFTConfig", {"n_frequency": 50, "wavelet_family": "sym4"}),
    "pvera-unsaved": Method("PveraConfig", {"r": 6, "save_projection": False}),
    "randlora-unsaved": Method("RandLoraConfig", {"r": 6, "save_projection": False}),
    "pissa": Method("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "adamss": Method("AdamssConfig", {"r": 8, "num_subspaces": 3, "subspace_rank": 2}),
    "kasa": Method("LoraConfig", {"r": 4, "kasa_config": {}, "init_lora_weights": False}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("qwen2", tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


def exported(base: Path, *adapters: Path, folder: Path, **options: Any) -> Any:
    source = find_source(None, base, adapters[0], adapters[1:])
    chosen = {"formats": ["safetensors"], "types": ["f32"], **options}
    return prepare_export(source, chosen, folder / "merged").run()[0]


def _tensors(folder: Path) -> dict[str, Any]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in safetensors_torch.load_file(file).items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_model_is_the_one_that_peft_merges(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = adapter(base, tmp_path / "trained", METHODS[name])
    receipt = exported(base, trained, folder=tmp_path)
    theirs, ours = merged_by_peft(base, trained), _tensors(tmp_path / "merged")
    before = _tensors(base)
    assert sum(not tiny.torch.equal(theirs[key], before[key]) for key in ours) >= 4
    for key, values in ours.items():
        assert tiny.torch.allclose(values, theirs[key], rtol=1e-5, atol=1e-5), key
    assert receipt.adapter == find_adapter(trained).identity()
    assert any("its layers were merged by PEFT" in note for note in receipt.notes)
    assert "PEFT merges it now, layer by layer" in " ".join(capsys.readouterr().err.split())


def test_merged_layers_are_combined_with_other_adapters(base: Path, tmp_path: Path) -> None:
    first, second = adapter(base, tmp_path / "a", METHODS["tinylora"]), tiny.adapter(base, tmp_path / "b")
    receipt = exported(base, first, second, folder=tmp_path, adapter_weights=[0.5, 2.0])
    before, alone = _tensors(base), [merged_by_peft(base, first), merged_by_peft(base, second)]
    for key, values in _tensors(tmp_path / "merged").items():
        wanted = before[key] + 0.5 * (alone[0][key] - before[key]) + 2.0 * (alone[1][key] - before[key])
        assert tiny.torch.allclose(values, wanted, rtol=1e-5, atol=1e-5), key
    assert [each["name"] for each in receipt.combination["adapters"]] == ["a", "b"]


def test_what_it_needs_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapter(base, tmp_path / "trained", METHODS["tinylora"])
    with pytest.raises(ConfigError, match="PEFT merges into the base as it is stored, and --merge-base is nf4"):
        exported(base, trained, folder=tmp_path, merge_base="nf4")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(EnvironmentProblem, match=r"TINYLORA, which PEFT alone merges: .*; peft is not installed"):
        exported(base, trained, folder=tmp_path)


@pytest.mark.parametrize("kind", sorted(THROUGH_PEFT))
def test_an_adapter_that_peft_cannot_read_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    trained = tiny.adapter(base, tmp_path / "trained")
    path = trained / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": kind, "r": -3, "target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match=r"PEFT cannot merge|PEFT does not use"):
        exported(base, trained, folder=tmp_path)


def _configured(**export: Any) -> dict[str, Any]:
    return {"base": "b", "data": {"train": "t.jsonl"}, "quantization": {"bits": 16}, "export": export}


def test_a_merge_base_other_than_the_original_is_refused_before_the_training() -> None:
    with pytest.raises(ConfigError, match=r"export.merge_base is auto, and PEFT alone merges TinyLoRA"):
        parse_config({**_configured(merge_base="auto"), "adapter": {"kind": "tinylora"}})
    parse_config({**_configured(), "adapter": {"kind": "tinylora"}})


def test_a_rank_for_gguf_lora_admits_methods_without_a_low_rank() -> None:
    options = {"formats": ["gguf-lora"], "types": ["f32"]}
    with pytest.raises(ConfigError, match=r"approximate it with export.lora_rank"):
        parse_config({**_configured(**options), "adapter": {"kind": "lokr"}})
    parse_config({**_configured(**options, lora_rank=8), "adapter": {"kind": "lokr"}})
    with pytest.raises(ConfigError, match="cannot be exported as gguf-lora"):
        parse_config({**_configured(**options, lora_rank=8), "adapter": {"kind": "bitfit"}})


def test_the_run_of_such_an_adapter_is_recognized(base: Path, tmp_path: Path) -> None:
    """`mismatches` needs of a run its manifest and its adapter alone."""
    trained = adapter(base, tmp_path / "trained", METHODS["tinylora"])
    source = find_source(None, base, trained)
    receipt = prepare_export(source, {"formats": ["gguf"], "types": ["f16"]}, tmp_path / "x.gguf").run()[0]
    stored = SimpleNamespace(base=SimpleNamespace(files=receipt.base), captured_task=None)
    run: Any = SimpleNamespace(manifest=stored, adapter=trained, trained_adapter={})
    assert mismatches(gguf_reader.read(Path(receipt.artifact)).metadata, run) == []
