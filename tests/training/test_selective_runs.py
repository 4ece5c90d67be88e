"""`edgetune train` with methods that train tensors of the base itself: resume, storage, export, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from edgetune import cli
from edgetune.planning import optimizers
from edgetune.runs.directory import RunDirectory
from edgetune.training import checkpoints
from edgetune_converters.files.contents import sha256_of
from tests.training import runs
from tests.training.interruptions import stop_after

F32_KLD = 1e-7
"""f32 on both sides, and the coding of the reference."""
KINDS: dict[str, dict[str, Any]] = {
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "freeze": {"kind": "freeze", "layers": 1, "also": ["head"]},
    "llama-pro": {"kind": "llama-pro", "new_blocks": 2},
    "full": {"kind": "full"},
    "tokens": {"kind": "trainable-tokens", "tokens": ["<|im_start|>"], "new_tokens": ["please", "lamp"]},
}
BOTH = [(kind, 16) for kind in KINDS] + [("bitfit", 4), ("layernorm", 4), ("llama-pro", 4), ("tokens", 4)]


def _config(base: Path, folder: Path, adapter: dict[str, Any], bits: int, **export: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = runs.settings(base, folder, max_steps=5, save_steps=2, eval_steps=2)
    values["adapter"] = adapter
    values["quantization"] = {"bits": bits}
    values["export"] = {"types": ["f32"], **({"merge_base": "nf4"} if bits == 4 else {}), **export}
    return runs.write_config(folder / "config.yaml", values)


def _digests(run: RunDirectory) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in run.adapter.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), BOTH)
def test_a_run_resumes_bit_for_bit_and_its_file_is_the_trained_model(
    kind: str, bits: int, base: Path, tmp_path: Path
) -> None:
    config = _config(base, tmp_path, KINDS[kind], bits)
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    assert cli.run(["train", str(config), "-o", str(whole.path)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        assert cli.run(["train", str(config), "-o", str(stopped.path)]) == 130
    assert [checkpoints.step_of(each) for each in checkpoints.list_complete(stopped.checkpoints)] == [2]
    assert cli.run(["train", str(config), "-o", str(stopped.path), "--resume"]) == 0
    assert _digests(whole) == _digests(stopped) != {}
    assert not whole.train_results.adapter_is_zero

    file, results = tmp_path / "model.gguf", tmp_path / "results.json"
    assert cli.run(["merge-export", str(stopped.path), "-o", str(file)]) == 0
    assert cli.run(["validate", str(stopped.path), str(file), "--json", str(results)]) == 0
    rungs = {rung["kind"]: rung for rung in json.loads(results.read_text())["rungs"]}
    assert rungs["base"]["figures"]["kld"]["value"] > 10 * F32_KLD
    assert rungs["file"]["figures"]["kld"]["value"] < F32_KLD
    assert cli.run(["report", str(stopped.path), str(results), "-o", str(tmp_path / "report.html")]) == 0


_PROJECTION = {"rank": 8, "update_proj_gap": 2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {},
    "lion_32bit": {},
    "ademamix": {},
    "galore_adamw": _PROJECTION,
    "galore_adafactor": _PROJECTION,
    "apollo_adamw": _PROJECTION,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")  # of GaLore
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_full_fine_tuning_resumes_bit_for_bit_with_every_optimizer(optimizer: str, base: Path, tmp_path: Path) -> None:
    package = optimizers.OPTIMIZERS[optimizer].package
    if package is not None:
        pytest.importorskip(package)
    config = _config(base, tmp_path, KINDS["full"], 16)
    values = yaml.safe_load(config.read_text())
    values["training"] |= {"optimizer": optimizer, "optimizer_options": OPTIMIZERS[optimizer]}
    runs.write_config(config, values)
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    assert cli.run(["train", str(config), "-o", str(whole.path)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        assert cli.run(["train", str(config), "-o", str(stopped.path)]) == 130
    assert cli.run(["train", str(config), "-o", str(stopped.path), "--resume"]) == 0
    assert _digests(whole) == _digests(stopped) != {}
    assert whole.train_results.loss_last < whole.train_results.loss_first


@pytest.mark.slow
def test_the_reference_of_a_finished_run_is_captured_again(base: Path, tmp_path: Path) -> None:
    config = _config(base, tmp_path, KINDS["llama-pro"], 16)
    run = tmp_path / "run"
    assert cli.run(["train", str(config), "-o", str(run)]) == 0
    before = json.loads((run / "reference" / "reference.json").read_text())["summary"]["cross_entropy"]
    assert cli.run(["reference", str(run), "--rows", str(tmp_path / "validation.jsonl")]) == 0
    after = json.loads((run / "reference" / "reference.json").read_text())["summary"]["cross_entropy"]
    assert after.keys() == before.keys()


def test_new_blocks_are_in_the_config_of_an_exported_directory(base: Path, tmp_path: Path) -> None:
    config = _config(base, tmp_path, KINDS["llama-pro"], 16, formats=["safetensors"], types=["f32"])
    run = tmp_path / "run"
    assert cli.run(["train", str(config), "-o", str(run), "--set", "training.max_steps=1"]) == 0
    assert cli.run(["merge-export", str(run), "-o", str(tmp_path / "merged")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "merged").num_hidden_layers == 4


REFUSED: dict[str, tuple[dict[str, Any], int, dict[str, Any], list[str]]] = {
    "4 bits and a pair of factors": (
        {"kind": "full"}, 4, {"formats": ["gguf", "gguf-lora"]},
        ["adapter.kind: full cannot be trained with quantization.bits: 4", "cannot be exported as gguf-lora"],
    ),
    "freeze on 4 bits": ({"kind": "freeze"}, 4, {}, ["adapter.kind: freeze", "set quantization.bits: 16"]),
    "more blocks than there are": (
        {"kind": "freeze", "layers": 3, "modules": ["mlpx"]}, 16, {},
        ["adapter.layers is 3, and the base has 2 blocks", "adapter.modules: 'mlpx'", "mlp.up_proj"],
    ),
    "a block that is not there": (
        {"kind": "freeze", "layers": [0, 7]}, 16, {}, ["adapter.layers names the block 7", "2 blocks, 0 to 1"]
    ),
    "no divisor": (
        {"kind": "llama-pro", "new_blocks": 3}, 16, {},
        ["adapter.new_blocks 3 does not divide the 2 blocks", "Give one of 1, 2"],
    ),
    "a bias of an unknown layer": (
        {"kind": "bitfit", "added_to": ["q_projx", "lm_head"]}, 16, {},
        ["adapter.added_to: 'q_projx' fits no linear layer", "lm_head"],
    ),
    "no bias at all": ({"kind": "bitfit", "added_to": "none"}, 16, {}, ["the base has no biases to train"]),
    "tokens that are there or are not": (
        {"kind": "trainable-tokens", "tokens": ["<|nowhere|>"], "new_tokens": ["lamp"]}, 16, {}, ["'<|nowhere|>'"],
    ),
    "a new token that is one": (
        {"kind": "trainable-tokens", "new_tokens": ["<|im_end|>"]}, 16, {}, ["'<|im_end|>' is a token of the base"],
    ),
    "no token": ({"kind": "trainable-tokens"}, 16, {}, ["names no token"]),
    "a token twice": ({"kind": "trainable-tokens", "tokens": ["a"], "new_tokens": ["a"]}, 16, {}, ["name 'a' twice"]),
    "a pair of factors": ({"kind": "bitfit"}, 16, {"formats": ["gguf-lora"]}, ["gguf-lora", "low-rank"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_training(
    name: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, bits, export, expected = REFUSED[name]
    config = _config(base, tmp_path, adapter, bits, **{"merge_base": "original", **export})
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert [text for text in expected if text not in message] == []
    assert not (tmp_path / "run").exists()
