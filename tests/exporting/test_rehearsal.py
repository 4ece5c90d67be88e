"""`edgetune plan --try`: what would fail after a training fails on two layers of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgetune.config import load_config
from edgetune.errors import ConfigError
from edgetune.exporting import rehearsal
from edgetune.planning.base_model import find_base
from edgetune.planning.twin import copy_twin
from tests.cli_runner import edgetune
from tests.training import runs

transformers: Any = pytest.importorskip("transformers")
safetensors: Any = pytest.importorskip("safetensors.torch")
torch: Any = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, of which two are tried."""
    folder = tmp_path_factory.mktemp("rehearsal")
    made = runs.make_base(folder / "base")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**runs.SHAPE | {"num_hidden_layers": 3})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return runs.write_config(folder / "config.yaml", runs.settings(base, folder))


def test_a_copy_has_the_tensors_of_the_first_layers_and_no_others(base: Path, config: Path, tmp_path: Path) -> None:
    found = copy_twin(find_base(load_config(config)), 2, tmp_path)
    whole, part = (safetensors.load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert part.keys() == {name for name in whole if ".layers.2." not in name}
    assert all(torch.equal(part[name], whole[name]) for name in part)
    assert len(found.checkpoint.tensors) == len(part)


def test_two_layers_go_through_all_stages(config: Path) -> None:
    result = edgetune("plan", config, "--no-probe", "--try", "--json")
    assert result.returncode == 0, result.stderr.decode()
    sections = json.loads(result.stdout)["sections"]
    stages = sections["tried on 2 layers with the real tokenizer"]
    assert list(stages) == ["train", "export", "answer", "validate"]
    assert "contract holds" in stages["validate"]["reason"]
    assert stages["export"]["reason"] == "gguf q8_0"
    assert not list(Path.cwd().glob("runs/trial*"))


def test_what_is_not_run_cannot_be_tried(config: Path) -> None:
    options = load_config(config, ["export.formats=[safetensors]", "export.types=[f16]"])
    with pytest.raises(ConfigError, match=r"--try: export\.formats has neither gguf nor onnx"):
        rehearsal.rehearse(options)
