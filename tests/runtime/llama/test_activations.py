"""The sums of an importance matrix, compared with the inputs of transformers' layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama.activations import ActivationSums
from edgetune.runtime.llama.runtime import LlamaRuntime
from tests.converters import family_models, tiny
from tests.runtime import models

torch, transformers = tiny.torch, tiny.transformers

# The first layer's inputs are f32 on both sides: only the order of the sums differs. Behind its attention the rounding
# of keys and values to f16 (2^-11 each) is in every value, and these random models enlarge it layer by layer.
FIRST, LATER = 1e-5, 1e-2
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def test_sums_are_those_of_the_inputs_in_transformers(tmp_path: Path) -> None:
    for name in ("llama", "qwen2", "qwen3"):
        base = models.base(tmp_path / name, name)
        rows = [np.array(tiny.random_ids(count, seed=count), np.int32) for count in (90, 7, 40)]
        found = _sums(models.gguf(base, tmp_path / f"{name}.gguf"), rows)
        wanted = _sums_of_transformers(base, rows)
        assert found.keys() == wanted.keys()
        _assert_same(found, wanted, 137)


def test_rows_longer_than_a_batch_are_evaluated_as_one_text(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", max_position_embeddings=1024)
    rows = [np.array(tiny.random_ids(700), np.int32)]
    found, wanted = _sums(models.gguf(base, tmp_path / "m.gguf"), rows), _sums_of_transformers(base, rows)
    _assert_same(found, wanted, 700)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_each_expert_has_the_sums_of_the_tokens_that_it_takes(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    rows = [np.array(tiny.random_ids(count, seed=count), np.int32) for count in (60, 21)]
    found = _sums(models.gguf(base, tmp_path / "m.gguf"), rows)
    for layer in range(2):
        router, experts = found[f"blk.{layer}.ffn_gate_inp.weight"], found[f"blk.{layer}.ffn_up_exps.weight"]
        down = found[f"blk.{layer}.ffn_down_exps.weight"]
        assert (router.counts.tolist(), experts.counts.sum()) == ([81], 2 * 81)
        assert (experts.counts > 0).sum() > 1
        assert experts.sums.shape == (5, router.sums.shape[1])
        np.testing.assert_allclose(experts.sums.sum(0), 2 * router.sums[0], rtol=1e-4)  # two experts take each token
        np.testing.assert_array_equal(down.counts, experts.counts)
        assert ((down.sums.sum(1) > 0) == (down.counts > 0)).all()


def test_inputs_that_are_not_finite_are_an_error_with_the_tensor(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", "llama")
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({key: value * (1e25 if "v_proj" in key else 1) for key, value in tensors.items()}, file)
    with pytest.raises(RuntimeProblem, match=r"the inputs of blk\.0\.attn_output\.weight are not all finite"):
        _sums(models.gguf(base, tmp_path / "m.gguf"), [np.array(tiny.random_ids(30), np.int32)])


def _assert_same(found: dict[str, ActivationSums], wanted: dict[str, NDArray[np.float64]], tokens: int) -> None:
    for tensor, sums in wanted.items():
        assert found[tensor].counts.tolist() == [tokens]
        is_first = tensor in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
        error = np.linalg.norm(found[tensor].sums[0] - sums) / np.linalg.norm(sums)
        assert error < (FIRST if is_first else LATER), tensor


def _sums(file: Path, rows: list[NDArray[np.int32]]) -> dict[str, ActivationSums]:
    with LlamaRuntime(file, context=max(map(len, rows)), threads=1) as runtime:
        return runtime.add_up_activations(rows)


def _sums_of_transformers(base: Path, rows: list[NDArray[np.int32]]) -> dict[str, NDArray[np.float64]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    sums: dict[str, NDArray[np.float64]] = {}

    def add(tensor: str, inputs: Any) -> None:
        squares = inputs[0].detach().double().numpy().reshape(-1, inputs[0].shape[-1]) ** 2
        sums[tensor] = sums.get(tensor, 0) + squares.sum(0)

    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in NAMES:
            tensor = f"blk.{name.split('.')[2]}.{NAMES[last]}.weight"  # model.layers.N.
            module.register_forward_pre_hook(lambda _, inputs, tensor=tensor: add(tensor, inputs))
    with torch.no_grad():
        for row in rows:
            model.eval()(torch.tensor(row[None].astype(np.int64)))
    return sums
