"""Checkpoints that contradict their own files, and templates without a generation prompt: said before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.cli import run
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.merging.merge_base import OriginalMergeBase
from edgetune_converters.model import open_model
from tests.converters import family_models
from tests.training import runs

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

HEADLESS = (
    "{% for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture
def base(plain_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_base, tmp_path / "base"))


def _change(base: Path, file: str, **values: Any) -> None:
    path = base / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _add_tensor(base: Path, name: str, shape: tuple[int, ...]) -> None:
    file = base / "model.safetensors"
    tensors = safetensors.load_file(file)
    safetensors.save_file({**tensors, name: torch.full(shape, 0.5, dtype=torch.bfloat16)}, file, {"format": "pt"})


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """Run `edgetune train --dry-run` on a base, and return the exit code and what it says."""

    def started(base: Path) -> tuple[int, str]:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(runs.settings(base, tmp_path)))
        code = run(["train", "--dry-run", str(config)])
        return code, " ".join(capsys.readouterr().err.split())

    return started


@pytest.mark.parametrize(
    ("name", "size", "flag"),
    [("self_attn.q_proj.bias", 64, "attention_bias"), ("mlp.down_proj.bias", 64, "mlp_bias")],
)
def test_stored_biases_that_the_config_switches_off_are_refused(
    base: Path, dry_run: Callable[[Path], tuple[int, str]], name: str, size: int, flag: str
) -> None:
    _add_tensor(base, f"model.layers.0.{name}", (size,))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert not any(parameter.endswith(name) for parameter, _ in model.named_parameters())
    code, said = dry_run(base)
    assert code == 1
    assert f"config.json sets {flag}: false" in said
    assert f"model.layers.0.{name} is stored" in said
    _change(base, "config.json", **{flag: True})
    assert dry_run(base)[0] == 0


# family -> the field by which transformers' class makes the biases, None where no field does
FIELDS = {
    "llama": "attention_bias", "qwen3": "attention_bias", "granite": "attention_bias", "stablelm": "use_qkv_bias",
    "glm4": "attention_bias", "qwen2": None, "qwen2moe": None, "phi2": None, "starcoder2": None, "gpt2": None,
}  # fmt: skip
FALSE = {"attention_bias": False, "mlp_bias": False, "use_qkv_bias": False}


@pytest.mark.parametrize("family", FIELDS)
def test_stored_biases_are_refused_exactly_where_transformers_ignores_them(family: str, tmp_path: Path) -> None:
    field = FIELDS[family]
    options: dict[str, Any] = {field: True} if field else {}
    base = family_models.base(family, tmp_path / "base", **options)
    _change(base, "config.json", **FALSE)
    with safetensors.safe_open(base / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if name.endswith("proj.bias")}  # noqa: SIM118 - not a dict
    loaded = {name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    if not stored <= loaded:
        with pytest.raises(ArchitectureError, match=f"config.json sets {field}: false"):
            open_model(base, None, OriginalMergeBase())
    else:
        assert field is None
        open_model(base, None, OriginalMergeBase())


def test_an_eos_token_that_the_vocabulary_lacks_is_named(
    base: Path, dry_run: Callable[[Path], tuple[int, str]]
) -> None:
    _change(base, "tokenizer_config.json", eos_token="<|eot|>")
    code, said = dry_run(base)
    assert code == 1
    assert "has no token '<|eot|>', which its files name as eos_token" in said


def test_a_template_without_generation_prompt_is_said(base: Path, dry_run: Callable[[Path], tuple[int, str]]) -> None:
    assert "no generation prompt" not in dry_run(base)[1]
    _change(base, "tokenizer_config.json", chat_template=HEADLESS)
    code, said = dry_run(base)
    assert code == 0
    assert "begin each answer with '<|im_start|>assistant'" in said


def test_a_template_that_needs_no_generation_prompt_is_not_mentioned(
    base: Path, dry_run: Callable[[Path], tuple[int, str]]
) -> None:
    asked = "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    _change(base, "tokenizer_config.json", chat_template=asked + "{{ m.content + eos_token }}{% endif %}{% endfor %}")
    code, said = dry_run(base)
    assert code == 0
    assert "no generation prompt" not in said
