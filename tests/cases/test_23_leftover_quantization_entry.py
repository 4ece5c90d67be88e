"""Weights of 16 bits under an old quantization entry of config.json are weights of 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from edgetune import cli
from edgetune.runs.directory import RunDirectory
from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import tiny
from tests.export_requests import export
from tests.training import runs

torch, transformers = tiny.torch, tiny.transformers

ENTRIES: dict[str, Any] = {
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb-old": {"load_in_4bit": True, "load_in_8bit": False},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}
NO_ENTRIES: dict[str, Any] = {"null": None, "empty": {}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("leftover") / "plain")


def _with_entry(plain: Path, directory: Path, entry: Any) -> Path:
    shutil.copytree(plain, directory)
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return directory


@pytest.mark.parametrize("name", [*ENTRIES, *NO_ENTRIES])
def test_the_files_are_those_without_the_entry(name: str, plain: Path, tmp_path: Path) -> None:
    base = _with_entry(plain, tmp_path / "base", {**ENTRIES, **NO_ENTRIES}[name])
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, safetensors={"base": tmp_path / "merged"})
    export(plain, {"f32": tmp_path / "plain.gguf"})
    found, expected = (
        [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(tmp_path / file).tensors]
        for file in ("m.gguf", "plain.gguf")
    )
    assert found == expected
    assert ["the entry is ignored" in " ".join(receipt.notes) for receipt in receipts] == [name in ENTRIES] * 2
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ids = tiny.random_ids(32, 512)
    before, after = (tiny.torch_logits(one, None, ids) for one in (plain, tmp_path / "merged"))
    assert (before == after).all()


def test_a_run_on_such_a_base_is_a_run_on_the_plain_one(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes, losses = [], []
    for name in ("plain", "bnb"):
        base = plain if name == "plain" else _with_entry(plain, tmp_path / "base", ENTRIES["bnb"])
        folder = tmp_path / name
        folder.mkdir()
        config = runs.write_config(folder / "c.yaml", runs.settings(base, folder, max_steps=2))
        assert cli.run(["train", str(config), "-o", str(folder / "run")]) == 0
        run = RunDirectory.open(folder / "run")
        hashes.append(sha256_of(run.adapter / "adapter_model.safetensors"))
        losses.append([json.loads(line).get("loss") for line in run.metrics_file.read_text().splitlines()])
    assert hashes[0] == hashes[1]
    assert losses[0] == losses[1]
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", " ").count("the entry is ignored") == 1


@pytest.mark.parametrize(
    "entry", [{"quant_method": "bitnet"}, {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}]
)
def test_an_entry_that_says_how_plain_weights_are_computed_with_is_refused(
    entry: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="already quantized"):
        Checkpoint(_with_entry(plain, tmp_path / "base", entry))


@pytest.mark.parametrize(
    ("part", "said"), [("qweight", r"up_proj.scales is missing"), ("weight_packed", "packed in a way that 'gptq'")]
)
def test_packed_weights_without_their_parts_are_refused(part: str, said: str, plain: Path, tmp_path: Path) -> None:
    base = _with_entry(plain, tmp_path / "base", ENTRIES["gptq"])
    tensors = load_file(base / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{part}"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(base)


def test_a_base_that_is_really_in_four_bits_keeps_its_entry(plain: Path, tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.is_quantized
    assert not checkpoint.has_outdated_quantization
    assert checkpoint.notes == []
