"""Every family: a tiny random model, exported without quantization, has transformers' logits in llama.cpp."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from edgetune_converters import gguf
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export

# against transformers as it is; with llama.cpp's coarse GELU in it, only the order of sums is left
KLD, SAME = 1e-5, 0.999
SAME_GELU_KLD = 2e-8


@pytest.mark.parametrize("name", family_models.CASES)
def test_logits_of_the_exported_file_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, {"f32": tmp_path / "f32.gguf"})
    found = runtime.logits(tmp_path / "f32.gguf", family_models.ids(name))
    kld, same = tiny.divergence(family_models.reference(name, base), found)
    exact_kld, _ = tiny.divergence(family_models.reference(name, base, table_gelu=True), found)
    print(f"{name}: {kld:.1e} ({exact_kld:.1e} with the same GELU), {same:.4f}")
    assert kld < KLD
    assert same >= SAME
    assert exact_kld < SAME_GELU_KLD


# what happens to the tensors of the model, and what the adapter is on
_ON_EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "phi3": {},  # fused in the model and in the file
    "neox": {"rank_pattern": {"query_key_value": 7}},  # fused head by head
    "bloom": {},
    "falcon-40b": {"use_rslora": True},  # fused group by group
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},  # transposed
    "deepseek-v2": {},  # one matrix for two tensors, one of them transposed head by head
    "lfm2": {"target_modules": ["in_proj", "out_proj", "q_proj", "w1", "w2", "w3"]},
    "gemma2": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},  # stored less one
    "qwen2moe": {},  # beside experts
    "stablelm": {},
    "mixtral": {},  # on all experts at once, which the checkpoint holds one by one
    "mixtral-fused": _ON_EXPERTS,
    "deepseek-v3": {},
    "gpt-oss": _ON_EXPERTS | {"use_rslora": True},  # stored transposed
    "llama4": {
        "target_modules": ["q_proj"],
        "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    },
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gets_the_operations_of_its_tensor(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = family_models.ids(name)
    trained = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(trained, tiny.torch_logits(base, None, ids))[0] > 1e-3, "the adapter must matter"
    kld, _ = tiny.divergence(trained, runtime.logits(tmp_path / "f32.gguf", ids))
    print(f"{name}: {kld:.1e}")
    assert kld < KLD


def test_an_adapter_on_single_experts_is_one_on_their_parts_of_the_whole(tmp_path: Path) -> None:
    """Adapters of transformers 4 speak of each expert's own modules, those of 5 of parameters that hold all experts."""
    base = family_models.base("qwen3moe", tmp_path / "base")
    whole = tiny.adapter(base, tmp_path / "whole", **_ON_EXPERTS | {"target_modules": ["q_proj"]})
    path = tmp_path / "single"
    shutil.copytree(whole, path)
    with safe_open(whole / "adapter_model.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    for key in [key for key in tensors if ".experts." in key and "lora_A" in key]:
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        rows = ("gate_proj", "up_proj") if ".base_layer" in key else ("down_proj",)
        start = key[: key.index(".experts.")] + ".experts."
        for expert in range(5):
            left = b.reshape(b.shape[0], -1, 5)[:, :, expert]
            for part, name in zip(np.split(left, len(rows)), rows, strict=True):
                tensors[start + f"{expert}.{name}.lora_A.weight"] = np.ascontiguousarray(
                    a.reshape(5, -1, a.shape[1])[expert]
                )
                tensors[start + f"{expert}.{name}.lora_B.weight"] = np.ascontiguousarray(part)
    save_file(tensors, path / "adapter_model.safetensors")
    export(base, {"f32": tmp_path / "whole.gguf"}, adapter=whole)
    export(base, {"f32": tmp_path / "single.gguf"}, adapter=path)
    one, other = gguf.read(tmp_path / "whole.gguf"), gguf.read(tmp_path / "single.gguf")
    assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)
