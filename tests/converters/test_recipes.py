"""The same types and bytes as llama-quantize: the direct export against the real quantizer on our f32 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune_native
from edgetune_converters import gguf
from edgetune_converters.architectures import slots
from edgetune_converters.errors import RecipeError
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.recipes import RECIPES, ModelFacts, TensorFacts
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export, plan_gguf

# 17 layers: more than 16 for the rules of sixteenths, and a multiple of nothing; four query heads share a key head
_DEEP: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.02,
}  # fmt: skip
_EIGHTY: dict[str, Any] = _DEEP | {"num_hidden_layers": 80, "num_attention_heads": 2, "num_key_value_heads": 1}

_BY_DEPTH = ["q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "iq4_nl", "iq4_xs"]

# what the model is like -> family, options, recipes
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "deep, untied, grouped": ("llama", _DEEP, _BY_DEPTH),
    "tied, not grouped": ("qwen3", _DEEP | {"num_key_value_heads": 8, "num_hidden_layers": 8}, list(RECIPES)),
    "odd rows": ("llama", {}, list(RECIPES)),
    "odd rows, tied": ("llama-tied", {"intermediate_size": 172, "num_key_value_heads": 1}, list(RECIPES)),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_stored_as_llama_quantize_stores_it(model: str, tmp_path: Path) -> None:
    name, options, names = MODELS[model]
    _compare(tiny.base(name, tmp_path / "base", **options), names, tmp_path)


def test_the_value_matrices_of_a_70b_llama_get_more_bits(tmp_path: Path) -> None:
    _compare(tiny.base("llama", tmp_path / "base", **_EIGHTY), ["q3_k_s", "q4_k_m"], tmp_path)


# families whose names, fused matrices or experts the quantizer treats in a way of their own. Rows of 64 do not fill the
# blocks of k-quants, but what stands in for each of these shows which it would have been, and is soon written
_NARROW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 9}
_MANY: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": _NARROW | _MANY | {"head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": _NARROW | _MANY | {"hidden_size": 256, "intermediate_size": 256},
    "neox": _NARROW | {"num_attention_heads": 8},
    "falcon-40b": {"hidden_size": 64, "num_hidden_layers": 17, "num_attention_heads": 8, "num_kv_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 9, "n_head": 8},
    "mixtral": _NARROW | _MANY | {"head_dim": 32, "num_local_experts": 8},
    "qwen2moe": _NARROW | _MANY | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3moe": _NARROW | _MANY | {"head_dim": 32, "num_experts": 8, "num_local_experts": 8},
    "deepseek-v2": {"first_k_dense_replace": 2, "num_hidden_layers": 9},
    "gpt-oss": _NARROW | _MANY | {"head_dim": 32},
    "lfm2": {},
    "stablelm-12b": _NARROW | _MANY,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_mixed_as_llama_quantize_mixes_it(name: str, tmp_path: Path) -> None:
    _compare(
        family_models.base(name, tmp_path / "base", **FAMILIES[name]),
        [*_BY_DEPTH, "q8_0", "f16", "q3_k_l"],
        tmp_path,
    )


def _compare(base: Path, names: list[str], directory: Path) -> None:
    ours = {name: directory / f"ours.{name}.gguf" for name in names}
    export(base, ours | {"f32": directory / "ours.f32.gguf"}, allow_fallback=True)
    for name in names:
        theirs = directory / f"theirs.{name}.gguf"
        runtime.quantize(directory / "ours.f32.gguf", theirs, RECIPES[name].file_type)
        _assert_equal(gguf.read(ours[name]), gguf.read(theirs), name)
        theirs.unlink()


def _assert_equal(ours: gguf.GgufFile, theirs: gguf.GgufFile, recipe: str) -> None:
    wanted = {entry.name: entry.type for entry in theirs.tensors}
    assert {entry.name: entry.type for entry in ours.tensors} == wanted, recipe
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
    for name in wanted:
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), (recipe, name)


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    (plan,) = plan_gguf(base, ["q4_k_m"])
    (receipt,) = export(base, {"q4_k_m": tmp_path / "model.gguf"}, allow_fallback=True)
    written = gguf.read(tmp_path / "model.gguf")
    assert [(row.name, row.type, row.bytes) for row in plan.rows] == [
        (entry.name, entry.type, entry.bytes) for entry in written.tensors
    ]
    assert (receipt.types, receipt.fallback_share) == (plan.bytes_by_type, round(plan.fallback_share, 4))
    assert receipt.bits_per_weight == pytest.approx(plan.bytes * 8 / plan.weights, abs=1e-4)


def test_rows_that_fit_no_block_are_refused_with_what_fits(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    with pytest.raises(RecipeError, match=r"q4_k_m does not fit this model: 9\d%.*rows of 96, 160") as caught:
        export(base, {"q4_k_m": tmp_path / "model.gguf"})
    assert "Types that fit: f32, f16, bf16, q8_0, q4_0" in str(caught.value.hint)
    assert list(tmp_path.glob("*.gguf*")) == []


def test_an_unknown_type_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'q9_9' is not a storage type") as caught:
        export(tmp_path, {"q9_9": tmp_path / "model.gguf"})
    assert "q4_k_m" in str(caught.value.hint)


@pytest.mark.parametrize(("name", "recipe"), [("Q4_K", "q4_k_m"), ("q5_k", "q5_k_m"), ("Q8_0", "q8_0")])
def test_names_are_taken_as_users_write_them(name: str, recipe: str) -> None:
    assert recipes.recipe_named(name).name == recipe


def test_vectors_stay_in_f32_and_the_reason_is_given() -> None:
    norm = TensorFacts("output_norm", "weight", None, "output_norm.weight", (256,), "bf16")
    head = TensorFacts(slots.OUTPUT, "weight", None, "output.weight", (300, 256), "bf16")
    plan = recipes.plan_storage(RECIPES["q4_k_m"], [norm, head], ModelFacts(2, 4, 4, "llama"))
    assert [(row.type, row.reason) for row in plan.rows] == [
        ("f32", "vectors stay in f32"),
        ("q6_k", "the output matrix keeps more bits"),
    ]


def test_storage_types_are_those_of_libggml() -> None:
    for name in edgetune_native.types():
        mine = BY_NAME[name]
        assert (mine.id, mine.block) == (edgetune_native.ggml_type_id(name), edgetune_native.block_size(name))
        assert mine.bytes == edgetune_native.row_bytes(name, mine.block)


def test_file_types_are_those_of_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    for recipe in RECIPES.values():
        theirs = constants.LlamaFileType(recipe.file_type).name.lower().replace("mostly_", "").replace("all_", "")
        assert theirs == recipe.name, "a recipe is a file type of llama.cpp; --tensor-type makes other mixes"
