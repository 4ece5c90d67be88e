"""Keys with the name of a wrapper in them (torch.compile, DDP, FSDP, checkpointing) are those of the model inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from edgetune.config import load_config
from edgetune.planning.base_model import find_base
from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import runtime, tiny
from tests.converters.test_adapters import TARGETS, A, B, pair, write
from tests.export_requests import export
from tests.training.runs import settings, write_config

Rename = Callable[[str], str]


def _in_layers(name: str, wrapper: str) -> str:
    """The name with a wrapper around each layer."""
    parts = name.split(".")
    if "layers" not in parts:
        return name
    at = parts.index("layers") + 2
    return ".".join([*parts[:at], wrapper, *parts[at:]])


WRAPPED: dict[str, Rename] = {
    "torch.compile": lambda name: "_orig_mod." + name,
    "torch.compile inside PEFT": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "data parallel": lambda name: "module." + name,
    "data parallel inside PEFT": lambda name: name.replace("base_model.model.", "base_model.model.module."),
    "compiled data parallel": lambda name: "_orig_mod.module." + name,
    "fsdp": lambda name: "_fsdp_wrapped_module." + _in_layers(name, "_fsdp_wrapped_module"),
    "checkpointed": lambda name: _in_layers(name, "_checkpoint_wrapped_module"),
    "PEFT twice": lambda name: "base_model.model." + name,
    "Lightning": lambda name: "model." + name,
    "TRL with a value head": lambda name: "pretrained_model." + name,
    "model twice": lambda name: name.replace("base_model.model.", "base_model.model.model."),
    "no prefix of PEFT": lambda name: name.replace("base_model.model.", "module."),
}


def _renamed(source: Path, target: Path, rename: Rename) -> Path:
    """A copy of an adapter with other keys."""
    shutil.copytree(source, target)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, target / "adapter_model.safetensors")
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama3-rope", tmp_path_factory.mktemp("wrapped") / "base")


@pytest.fixture(scope="module")
def clean(base: Path) -> Path:
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    return tiny.adapter(base, base.parent / "clean", **options)


@pytest.fixture(scope="module")
def clean_tensors(base: Path, clean: Path) -> dict[str, bytes]:
    export(base, {"f32": base.parent / "clean.gguf"}, adapter=clean)
    return _tensors(base.parent / "clean.gguf")


def _tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_file_is_that_of_the_clean_adapter(
    wrapper: str, base: Path, clean: Path, clean_tensors: dict[str, bytes], tmp_path: Path
) -> None:
    adapter = _renamed(clean, tmp_path / "adapter", WRAPPED[wrapper])
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter)
    assert _tensors(tmp_path / "m.gguf") == clean_tensors
    assert sum("wrapper" in note for note in receipt.notes) == 1


def test_the_clean_adapter_gives_the_logits_of_peft_and_no_note(base: Path, clean: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=clean)
    ids = tiny.random_ids(64)
    kld, same = tiny.divergence(tiny.torch_logits(base, clean, ids), runtime.logits(tmp_path / "m.gguf", ids))
    assert (kld < 1e-6, same) == (True, 1.0)
    assert not [note for note in receipt.notes if "wrapper" in note]


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_the_value_head_of_ppo_is_left_out_with_a_note(
    prefix: str, base: Path, clean: Path, clean_tensors: dict[str, bytes], tmp_path: Path
) -> None:
    """TRL saves `v_head.summary` in the state of AutoModelForCausalLMWithValueHead."""
    adapter = _renamed(clean, tmp_path / "adapter", lambda name: prefix + name)
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = {"v_head.summary.weight": np.ones((1, 64), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    save_file({**tensors, **head}, adapter / "adapter_model.safetensors")
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter)
    assert _tensors(tmp_path / "m.gguf") == clean_tensors
    said = "2 tensors are of the value head, which only PPO's training needs; left out: v_head.summary."
    assert [note for note in receipt.notes if note.startswith(said)]


def test_an_adapter_of_a_model_without_its_head(base: Path, tmp_path: Path) -> None:
    plain = tiny.adapter(base, tmp_path / "plain", target_modules=["q_proj", "down_proj"])
    headless = tiny.transformers.AutoModel.from_pretrained(base, dtype=tiny.torch.float32)
    settings = tiny.peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    with tiny._between_libraries():
        tiny.peft.get_peft_model(headless, settings).save_pretrained(tmp_path / "headless")
    names = load_file(tmp_path / "headless" / "adapter_model.safetensors").keys()
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    adapter = _renamed(plain, tmp_path / "adapter", lambda name: name.replace("model.model.", "model.", 1))
    assert load_file(adapter / "adapter_model.safetensors").keys() == names
    export(base, {"f32": tmp_path / "plain.gguf"}, adapter=plain)
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter)
    assert _tensors(tmp_path / "m.gguf") == _tensors(tmp_path / "plain.gguf")
    said = "the adapter's keys lack 'model.' in front, as those of a model without its head; added"
    assert receipt.notes == [said]


def test_other_formats_take_the_wrapper_away_too(base: Path, tmp_path: Path) -> None:
    plain = tiny.adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    adapter = _renamed(plain, tmp_path / "adapter", WRAPPED["compiled data parallel"])
    found = {}
    for name, one in (("plain", plain), ("wrapped", adapter)):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        lora, merged, onnx = {"f32": out / "l.gguf"}, {"base": out / "st"}, {"f32": out / "onnx"}
        receipts = export(base, {}, lora=lora, safetensors=merged, onnx=onnx, adapter=one)
        noted = ["wrapper" in " ".join(receipt.notes) for receipt in receipts]
        assert noted == [name == "wrapped"] * 3
        weights = [*sorted((out / "onnx").glob("*.data")), out / "st" / "model.safetensors"]
        found[name] = [_tensors(out / "l.gguf"), *(path.read_bytes() for path in weights)]
    assert len(found["plain"]) > 2
    assert found["plain"] == found["wrapped"]


def test_a_parameter_of_all_experts_under_a_wrapper(tmp_path: Path) -> None:
    experts, rank = 3, 2
    a, b = np.ones((rank * experts, 4), np.float32), np.ones((6, rank * experts), np.float32)
    targets = {"m.layers.0.experts.down": (experts, 6, 4)}
    adapter = write(
        tmp_path, pair("_orig_mod.module.base_model.model.m.layers.0._fsdp_wrapped_module.experts.base_layer", a, b)
    )
    assert Adapter(adapter).changes(BaseTargets(targets)).keys() == targets.keys()


def test_patterns_of_the_config_see_the_name_without_the_wrapper(tmp_path: Path) -> None:
    adapter = write(tmp_path, pair("module.base_model.model.m.q"), alpha_pattern={"^m.q": 6})
    factors = Adapter(adapter).changes(BaseTargets(TARGETS))["m.q.weight"].factors
    assert factors is not None
    left, right = factors()
    assert np.allclose(left @ right, 6 / 2 * B @ A)


def test_a_module_of_the_base_with_the_name_of_a_wrapper_is_itself(tmp_path: Path) -> None:
    targets = {"module.q.weight": (6, 4), "q.weight": (6, 4)}
    adapter = Adapter(write(tmp_path, pair("base_model.model.module.q")))
    assert adapter.changes(BaseTargets(targets)).keys() == {"module.q.weight"}
    assert adapter.notes == []


def test_one_prefix_is_found_that_all_keys_have(tmp_path: Path) -> None:
    targets = {"module.q.weight": (6, 4), "q.weight": (6, 4), "r.weight": (6, 4)}
    adapter = write(tmp_path, pair("module.q") | pair("module.r"))
    assert Adapter(adapter).changes(BaseTargets(targets)).keys() == {"q.weight", "r.weight"}


def test_a_name_that_fits_in_two_ways_is_refused_with_the_candidates(tmp_path: Path) -> None:
    targets = {"module.q.weight": (6, 4), "q.weight": (6, 4)}
    adapter = write(tmp_path, pair("module.module.q"))
    with pytest.raises(AdapterError, match=r"module\.module\.q can be module\.q or q of the base model"):
        Adapter(adapter).changes(BaseTargets(targets))


def test_two_keys_that_become_one_are_refused(tmp_path: Path) -> None:
    adapter = write(tmp_path, pair("base_model.model.m.q") | pair("base_model.model._orig_mod.m.q"))
    with pytest.raises(AdapterError, match="is duplicated under another name"):
        Adapter(adapter).changes(BaseTargets(TARGETS))


def test_unknown_names_are_one_line_with_the_first_of_them(tmp_path: Path) -> None:
    names = [f"module.base_model.model.n.{number}" for number in range(40)]
    tensors: dict[str, Any] = {key: value for name in names for key, value in pair(name).items()}
    with pytest.raises(AdapterError) as refusal:
        Adapter(write(tmp_path, tensors)).changes(BaseTargets(TARGETS))
    assert refusal.value.message.startswith("40 names are not modules of the base model: module.base_model.model.n.0, ")
    assert refusal.value.message.endswith(" and 37 more")


# -- the base's own tensors --------------------------------------------------------------------------------------------


def _wrapped_base(base: Path, target: Path, rename: Rename) -> Path:
    shutil.copytree(base, target)
    tensors = load_file(base / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("wrapper", ["torch.compile", "fsdp", "checkpointed"])
def test_a_base_with_wrapped_names_is_the_base(
    wrapper: str, base: Path, clean: Path, clean_tensors: dict[str, bytes], tmp_path: Path
) -> None:
    wrapped = _wrapped_base(base, tmp_path / "base", WRAPPED[wrapper])
    merged = {"base": tmp_path / "merged"}
    receipts = export(wrapped, {"f32": tmp_path / "m.gguf"}, safetensors=merged, adapter=clean)
    assert _tensors(tmp_path / "m.gguf") == clean_tensors
    assert all("wrapper" in " ".join(receipt.notes) for receipt in receipts)
    assert Checkpoint(tmp_path / "merged").tensors.keys() - {"lm_head.weight"} == Checkpoint(base).tensors.keys()


def test_a_base_that_holds_a_tensor_with_and_without_the_wrapper_is_refused(base: Path, tmp_path: Path) -> None:
    doubled = _wrapped_base(base, tmp_path / "base", str)
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {"_orig_mod." + name: tensors[name]}, doubled / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"holds {name} twice, with and without _orig_mod"):
        Checkpoint(doubled)


def test_training_refuses_names_under_which_transformers_loads_nothing(base: Path, tmp_path: Path) -> None:
    wrapped = _wrapped_base(base, tmp_path / "base", WRAPPED["torch.compile"])
    with pytest.raises(CheckpointError, match=r"carry _orig_mod, the name of a wrapper"):
        find_base(load_config(write_config(tmp_path / "c.yaml", settings(wrapped, tmp_path))))
