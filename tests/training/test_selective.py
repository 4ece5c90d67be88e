"""Methods that train tensors of the base itself: the changed model, what is stored of it, and its exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgetune.config import parse_config
from edgetune.errors import RunDirectoryError
from edgetune.methods import BitFit, Freeze, Full, LlamaPro, Method
from edgetune.planning.base_model import find_base
from edgetune.planning.disk import count_adapter_parameters
from edgetune.training import adapters
from edgetune_converters.errors import AdapterError
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import family_models, runtime, tiny
from tests.converters.onnx import session
from tests.export_requests import export

F32_KLD = 1e-8
"""f32 on both sides: only the order of sums differs."""
METHODS_TRAINED: dict[str, Method] = {
    "bitfit": BitFit(),
    "freeze": Freeze(layers=1, also=["norm"]),
    "freeze-embedding": Freeze(layers=[0], modules=["mlp"], also=["embedding"]),
    "llama-pro": LlamaPro(new_blocks=3),
    "full": Full(),
}
FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3")
IDS = torch.tensor([[5, 17, 300, 42, 7, 8, 9, 500]])


def _disturb(model: Any) -> Any:
    """Change every trained tensor, as a training does."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(model(IDS).logits[0].float().numpy())


def _changed(base: Path, method: Method) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return _disturb(adapters.add_adapter(model, method))


@pytest.mark.parametrize("name", METHODS_TRAINED)
def test_a_changed_model_can_be_switched_to_its_base_and_back(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    before = _logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    model = _changed(base, METHODS_TRAINED[name])
    trained = _logits(model)
    with model.disable_adapter():
        assert np.array_equal(_logits(model), before)
    assert not np.allclose(trained, before, atol=1e-2)
    assert np.array_equal(_logits(model), trained)


@pytest.mark.parametrize("name", METHODS_TRAINED)
def test_stored_tensors_make_the_same_model_of_the_base(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    model = _changed(base, METHODS_TRAINED[name])
    model.save_pretrained(tmp_path / "adapter")
    again = adapters.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert np.array_equal(_logits(again), _logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    _changed(base, Freeze(layers=[1])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunDirectoryError, match=r"other trained tensors than the configuration: model\.layers\.0\."):
        _changed(base, Freeze(layers=[0])).load_trained(tmp_path / "adapter")


def test_only_trained_tensors_are_stored_under_names_of_the_base(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    _changed(base, Freeze(layers=[1], modules=["self_attn"])).save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["edgetune_method"], stated["layers"]) == (None, "freeze", [1])


def test_transformers_loads_the_result_of_full_fine_tuning(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    model = _changed(base, Full())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert np.array_equal(_logits(again), _logits(model))


def test_new_blocks_are_those_of_a_model_with_more_layers(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    model = _changed(base, LlamaPro(new_blocks=3))
    stated = copy.deepcopy(model.config)
    assert (stated.num_hidden_layers, len(model.model.layers)) == (6, 6)
    larger = LlamaForCausalLM(LlamaConfig(**stated.to_dict())).eval()
    larger.load_state_dict(model.state_dict())
    assert np.array_equal(_logits(larger), _logits(model))


def test_generation_with_a_cache_is_that_without_one(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    model = _changed(base, LlamaPro(new_blocks=1))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", METHODS_TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_file_answers_as_the_changed_model(family: str, name: str, tmp_path: Path) -> None:
    base = tiny.base(family, tmp_path / "base")
    if (family, name) == ("qwen3", "bitfit"):
        pytest.skip("see test_new_biases.py")
    model = _changed(base, METHODS_TRAINED[name])
    model.save_pretrained(tmp_path / "adapter")
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=tmp_path / "adapter")
    ids = tiny.random_ids()
    with torch.no_grad():
        trained = model(torch.tensor([ids])).logits[0].float().numpy()
    assert tiny.divergence(trained, tiny.torch_logits(base, None, ids))[0] > 1e-3, "the change must matter"
    kld, same = tiny.divergence(trained, runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("name", METHODS_TRAINED)
def test_an_exported_directory_answers_in_transformers(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    model = _changed(base, METHODS_TRAINED[name])
    model.save_pretrained(tmp_path / "adapter")
    export(base, safetensors={"f32": tmp_path / "merged"}, adapter=tmp_path / "adapter")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert [info["missing_keys"], info["unexpected_keys"]] == [set(), set()]
    assert np.allclose(_logits(merged.eval()), _logits(model), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS_TRAINED)
def test_an_exported_graph_answers_as_the_changed_model(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    model = _changed(base, METHODS_TRAINED[name])
    model.save_pretrained(tmp_path / "adapter")
    export(base, onnx={"f32": tmp_path / "onnx"}, adapter=tmp_path / "adapter")
    kld, same = tiny.divergence(_logits(model), session.logits(tmp_path / "onnx", IDS[0].tolist()))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("family", ["gemma2", "command-r"])
def test_a_graph_holds_biases_that_no_other_format_does(family: str, tmp_path: Path) -> None:
    base = family_models.base(family, tmp_path / "base")
    config = parse_config({"base": str(base), "data": {"train": "rows.jsonl"}, "quantization": {"bits": 16}})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = _disturb(adapters.add_adapter(model, BitFit(), find_base(config).layers, ["onnx"]))
    assert any(name.endswith("mlp.down_proj.bias") for name in model.selection.parameters)
    model.save_pretrained(tmp_path / "adapter")
    export(base, onnx={"f32": tmp_path / "onnx"}, adapter=tmp_path / "adapter")
    kld, _ = tiny.divergence(_logits(model), session.logits(tmp_path / "onnx", IDS[0].tolist()))
    assert kld < 1e-6
    with pytest.raises(AdapterError, match=r"gguf: llama\.cpp reads no bias of"):
        export(base, {"f32": tmp_path / "f32.gguf"}, adapter=tmp_path / "adapter")


def test_a_pair_of_factors_is_refused_for_whole_tensors(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    _changed(base, Freeze(layers=1)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError):
        export(base, lora={"f32": tmp_path / "lora.gguf"}, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama-pro", "full", "bitfit"])
def test_a_gguf_file_is_a_base_too(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    export(base, {"f32": tmp_path / "base.gguf"})
    model = _changed(base, METHODS_TRAINED[name])
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "base.gguf", {"f32": tmp_path / "f32.gguf"}, adapter=tmp_path / "adapter")
    ids = IDS[0].tolist()
    kld, same = tiny.divergence(_logits(model), runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("name", METHODS_TRAINED)
def test_the_estimate_of_trained_values_is_no_less_than_their_number(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    method = METHODS_TRAINED[name]
    trained = adapters.count_trainable(_changed(base, method))
    estimate = count_adapter_parameters(Checkpoint(base), method)
    assert trained <= estimate
    assert name in ("bitfit", "freeze-embedding", "freeze") or trained == estimate
