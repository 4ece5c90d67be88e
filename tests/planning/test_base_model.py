"""A base from the hub: what is fetched, what is recorded, and that its code is not run unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from edgetune.config import parse_config
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.methods import Lora
from edgetune.planning import disk
from edgetune.planning.base_model import find_base
from edgetune.training.loading import load_model
from edgetune_converters.errors import CheckpointError
from tests.training import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose one model is our base; what was asked of it."""
    asked: dict[str, Any] = {}
    snapshot = shutil.copytree(base, tmp_path / "snapshots" / COMMIT)

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def _config(tmp_path: Path, **options: Any) -> Any:
    return parse_config({**runs.settings(tmp_path, tmp_path), **options})


def test_the_commit_is_recorded(hub: dict[str, Any], base: Path, tmp_path: Path) -> None:
    found = find_base(_config(tmp_path, base="org/model", revision="main"))
    assert (hub["name"], hub["revision"]) == ("org/model", "main")
    identity = found.identity
    assert (identity["name"], identity["revision"]) == ("org/model", COMMIT)
    assert set(identity["files"]) == {"config.json", "model.safetensors"}


def test_no_pickles_and_no_code_are_fetched(hub: dict[str, Any], tmp_path: Path) -> None:
    find_base(_config(tmp_path, base="org/model"))
    assert "*.safetensors" in hub["allow_patterns"]
    assert not [pattern for pattern in hub["allow_patterns"] if pattern.endswith((".bin", ".py", ".pt"))]
    find_base(_config(tmp_path, base="org/model", trust_remote_code=True), weights=False)
    assert "*.py" in hub["allow_patterns"]
    assert "*.safetensors" not in hub["allow_patterns"]


def test_what_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"neither a directory here nor a model that can be fetched .*: no network"
    ):
        find_base(_config(tmp_path, base="org/model"))
    with pytest.raises(CheckpointError, match="neither a directory or GGUF file nor the name of a model"):
        find_base(_config(tmp_path, base="a b c"))


def test_remote_code_is_not_run_unasked(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    options = _config(tmp_path, base=str(own))
    with pytest.raises(EnvironmentProblem, match="needs Python code that comes with it"):
        load_model(find_base(options), options)
    assert not (tmp_path / "ran").exists()


def test_disk_space_grows_with_rank_optimizer_and_reference(base: Path, tmp_path: Path) -> None:
    def needed(**options: Any) -> int:
        config = _config(tmp_path, base=str(base), **options)
        return disk.estimate_run_bytes(config, find_base(config).checkpoint, [])

    small = needed(adapter={"r": 8})
    assert needed(adapter={"r": 64}) > small
    assert needed(adapter={"r": 8}, training={"optimizer": "paged_adamw_32bit"}) > small
    checkpoint = find_base(_config(tmp_path, base=str(base))).checkpoint
    assert disk.count_adapter_parameters(checkpoint, Lora(r=8)) == 2 * 8 * (4 * 128 - 64 + 3 * (64 + 128))


def test_a_base_that_is_quantized_already_is_not_trained(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    in_four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=in_four_bits)
    model.save_pretrained(own)
    with pytest.raises(CheckpointError, match="already quantized; training quantizes the original weights"):
        find_base(_config(tmp_path, base=str(own)))


def test_the_tokenizer_of_another_directory_takes_the_place_of_the_base(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = find_base(_config(tmp_path, base=str(base), tokenizer=str(other)))
    assert found.path == base
    assert (found.directory / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (found.directory / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (found.directory / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(found.directory.glob("*.safetensors"))
    assert any("the chat template is that beside the adapter" in note for note in found.notes)


def test_a_directory_without_a_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        found = find_base(_config(tmp_path, base=str(base), tokenizer=str(tmp_path / folder)))
        with pytest.raises(ConfigError, match="has no file of a tokenizer"):
            _ = found.directory
