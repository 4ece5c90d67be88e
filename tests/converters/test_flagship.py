"""From training to file: a tiny model of each family, an adapter, a GGUF file, and the same logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune_native
from edgetune_converters import gguf
from tests.converters import runtime, tiny
from tests.export_requests import export

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 9, r"layers\.[02]\.self_attn\.o_proj": 3},
    },
}

# f32 on both sides: only the order of sums differs
F32_KLD = 1e-8
# llama.cpp rounds the activations of a q8_0 product to q8_0 as well: as much noise again as the weights' rounding, and
# noise of twice the variance is twice the divergence (measured: 1.6 to 2.0). The rest is for the luck of two samples.
Q8_NOISE = 3.0


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_of_the_exported_file_are_those_of_the_trained_model(name: str, kind: str, tmp_path: Path) -> None:
    base = tiny.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    files = {"f32": tmp_path / "model.f32.gguf", "q8_0": tmp_path / "model.q8_0.gguf"}

    export(base, files, adapter=adapter)

    ids = tiny.random_ids()
    trained = tiny.torch_logits(base, adapter, ids)
    untrained = tiny.torch_logits(base, None, ids)
    assert tiny.divergence(trained, untrained)[0] > 0.1, "the adapter must matter for this test to mean anything"
    f32_kld, f32_same = tiny.divergence(trained, runtime.logits(files["f32"], ids))
    q8_kld, _ = tiny.divergence(trained, runtime.logits(files["q8_0"], ids))
    rounded_kld, _ = tiny.divergence(trained, runtime.logits(_rounded(files, tmp_path), ids))
    print(f"{name} {kind}: f32 {f32_kld:.2e} q8_0 {q8_kld:.2e} weights rounded to q8_0 {rounded_kld:.2e}")
    assert (f32_kld < F32_KLD, f32_same) == (True, 1.0)
    assert q8_kld < Q8_NOISE * rounded_kld


def _rounded(files: dict[str, Path], directory: Path) -> Path:
    """The f32 file with the weights of the q8_0 file: the noise of rounding the weights, without the runtime's own."""
    rounded = directory / "rounded.gguf"
    shutil.copy(files["f32"], rounded)
    stored = gguf.read(files["q8_0"])
    with rounded.open("r+b") as file:
        for place, entry in zip(gguf.read(rounded).tensors, stored.tensors, strict=True):
            if entry.type != "f32":
                file.seek(place.offset)
                file.write(edgetune_native.dequantize(stored.tensor(entry.name), entry.type, entry.shape[-1]).tobytes())
    return rounded


def test_a_bf16_base_loses_nothing(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base", dtype="bfloat16")
    export(base, {"f32": tmp_path / "f32.gguf", "bf16": tmp_path / "bf16.gguf"})
    ids = tiny.random_ids()
    reference = tiny.torch_logits(base, None, ids)
    kld, same = tiny.divergence(reference, runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)
    # the same weights, but llama.cpp rounds activations to bf16 for bf16 matrices: 2^-9 of each, no more
    assert tiny.divergence(reference, runtime.logits(tmp_path / "bf16.gguf", ids))[0] < 1e-3


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_on_one_end_of_a_tied_model_unties_it(targets: list[str], tmp_path: Path) -> None:
    base = tiny.base("llama3-rope", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", *targets])
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    kld, same = tiny.divergence(tiny.torch_logits(base, adapter, ids), runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


def test_modules_to_save_replace_the_base(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    kld, same = tiny.divergence(tiny.torch_logits(base, adapter, ids), runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_pair_that_was_trained_tied(options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    stated: dict[str, Any] = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    adapter = tiny.adapter(base, tmp_path / "adapter", **stated | options)
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    kld, same = tiny.divergence(tiny.torch_logits(base, adapter, ids), runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)
    names = {entry.name for entry in gguf.read(tmp_path / "f32.gguf").tensors}
    # a saved matrix is the same at both ends; A and B of two ends need not round alike, and are then written twice
    assert "output.weight" not in names or "target_modules" in options


def test_trained_biases_replace_the_base(tmp_path: Path) -> None:
    base = tiny.base("qwen2", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], bias="lora_only")
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    kld, _ = tiny.divergence(tiny.torch_logits(base, adapter, ids), runtime.logits(tmp_path / "f32.gguf", ids))
    assert kld < F32_KLD


def test_without_an_adapter_the_base_is_exported(tmp_path: Path) -> None:
    base = tiny.base("mistral", tmp_path / "base")
    export(base, {"f32": tmp_path / "f32.gguf"})
    ids = tiny.random_ids()
    found = runtime.logits(tmp_path / "f32.gguf", ids)
    assert np.abs(tiny.torch_logits(base, None, ids) - found).max() < 1e-3
