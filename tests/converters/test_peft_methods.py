"""What every method of PEFT does to the base is folded as PEFT merges it, tensor by tensor, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from tests.converters import family_models, peft_methods, runtime, tiny
from tests.converters.onnx import session
from tests.converters.peft_methods import METHODS
from tests.export_requests import export

FAMILIES = ("llama", "qwen2", "gpt2", "mixtral-fused")
CASES = [
    pytest.param(name, family, id=f"{name}-{family}")
    for family in FAMILIES
    for name, method in METHODS.items()
    if family != "gpt2" or not method.linear_only
]
EXPORTED = [case for case in CASES if case.values[1] != "mixtral-fused"]
# relative to the largest weight of a tensor: f32 has a relative rounding of 6e-8, and a rotation sums over a row
ROUNDING = 2e-6
# mean divergence of f32 models: only the order of sums differs
F32_KLD = 1e-8

Trained = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Make the base of a family and the adapter of a method, once each."""
    directory = tmp_path_factory.mktemp("methods")

    def make(name: str, family: str) -> tuple[Path, Path]:
        base, adapter = directory / family, directory / f"{name}-{family}"
        if not base.exists() and family in tiny.MODELS:
            tiny.base(family, base, tie_word_embeddings=False)
        elif not base.exists():
            family_models.base(family, base)
        if not adapter.exists():
            # PEFT's LoRA would also take the parameters of all experts, which it refuses for DoRA
            dense = family == "mixtral-fused" and "dora" in name
            own = {"target_modules": ["q_proj", "v_proj", "o_proj"]} if dense else {}
            peft_methods.adapter(base, adapter, METHODS[name], **own)
        return base, adapter

    return make


@pytest.mark.parametrize(("name", "family"), CASES)
def test_merged_tensors_are_those_of_peft_and_compute_the_same(name: str, family: str, trained: Trained) -> None:
    base, adapter = trained(name, family)
    ours, theirs, before = (
        peft_methods.folded(base, adapter),
        peft_methods.merged_by_peft(base, adapter),
        peft_methods.folded(base, None),
    )
    changed = [key for key, values in ours.items() if not np.array_equal(values, before[key])]
    assert len(changed) > 5
    for key, values in ours.items():
        largest = float(theirs[key].abs().max())
        assert float((values - theirs[key]).abs().max()) <= ROUNDING * largest, key
    ids = tiny.random_ids(64)
    wanted = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(wanted, tiny.torch_logits(base, None, ids))[0] > 1000 * F32_KLD, "the adapter must matter"
    kld, same = tiny.divergence(wanted, peft_methods.logits(base, ours, ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize(("name", "family"), EXPORTED)
def test_the_exported_file_computes_what_peft_computes(
    name: str, family: str, trained: Trained, tmp_path: Path
) -> None:
    base, adapter = trained(name, family)
    onnx: dict[str, Any] = {"onnx": {"f32": tmp_path / "onnx"}} if family == "llama" else {}
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter, **onnx)
    ids = tiny.random_ids(96)
    wanted = tiny.torch_logits(base, adapter, ids)
    found = [runtime.logits(tmp_path / "f32.gguf", ids), *(session.logits(tmp_path / name, ids) for name in onnx)]
    for each in found:
        kld, same = tiny.divergence(wanted, each)
        assert (kld < F32_KLD, same) == (True, 1.0)


# what a method changes beside the weights of linear layers
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "norms and the head": ("LNTuningConfig", {"target_modules": ["norm"], "modules_to_save": ["lm_head"]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [3, 77, 500], "target_modules": ["embed_tokens"]}),
    "an embedding under DoRA": (
        "LoraConfig", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "r": 4},
    ),
    "the head under DoRA": ("LoraConfig", {"target_modules": ["lm_head", "q_proj"], "use_dora": True, "r": 4}),
    "an embedding under OFT": ("OFTConfig", {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 8}),
    "biases beside OFT": ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 8, "bias": "all"}),
    "biases of BOFT": ("BOFTConfig", {"target_modules": ["q_proj"], "boft_block_size": 4, "bias": "boft_only"}),
    "modules beside IA3": (
        "IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["norm"]},
    ),
    "tokens beside DoRA": (
        "LoraConfig", {"target_modules": ["q_proj"], "use_dora": True, "trainable_token_indices": [3, 77]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_what_a_method_changes_beside_linear_layers_is_exported(name: str, tied: bool, tmp_path: Path) -> None:
    base = tiny.base("qwen2", tmp_path / "base", tie_word_embeddings=tied)
    adapter = peft_methods.adapter(base, tmp_path / "adapter", peft_methods.Method(*BESIDE[name]))
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = [*tiny.random_ids(93), 3, 77, 500]
    wanted = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(wanted, tiny.torch_logits(base, None, ids))[0] > 1000 * F32_KLD, "the adapter must matter"
    kld, same = tiny.divergence(wanted, runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("name", ["dora", "lokr", "ia3", "boft"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_delta_of_each_block_is_the_merged_rows_without_those_of_the_base(
    name: str, family: str, trained: Trained
) -> None:
    if family == "gpt2" and METHODS[name].linear_only:
        family = "qwen2"
    base, adapter = trained(name, family)
    changed, before = (open_model(base, path, merge_base_named("original")) for path in (adapter, None))
    seen = 0
    for tensor, original in zip(changed.tensors, before.tensors, strict=True):
        for block, other in zip(
            tensor.blocks(changed.checkpoint, 3000), original.blocks(before.checkpoint, 3000), strict=True
        ):
            if block.delta is None:
                assert np.array_equal(block.floats, other.floats)
                continue
            seen += 1
            delta = block.delta().reshape(block.rows.shape)
            assert np.abs(block.floats - delta - other.floats).max() <= ROUNDING * np.abs(block.floats).max()
    assert seen > 10
