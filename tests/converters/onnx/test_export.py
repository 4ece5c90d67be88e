"""ONNX models from the merged stream: opened by plain ONNX Runtime, compared with transformers and with the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgetune_native
from edgetune_converters.errors import EdgetuneError, RecipeError
from edgetune_converters.onnx import plan
from edgetune_converters.onnx.plan import OnnxSettings
from edgetune_converters.quantization.imatrix import read_imatrix
from tests.converters import imatrices, tiny
from tests.converters.onnx import session
from tests.export_requests import export, plan_onnx

# what the type alone takes away from a random model of this size; the orders of magnitude are what is tested
WORST = {"f32": 1e-9, "f16": 1e-4, "int8": 0.05, "int4": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("base"), head_dim=32)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.adapter(base, tmp_path_factory.mktemp("adapter"))


def stored(folder: Path, name: str) -> Any:
    """An array of the file of weights, read by its entry in the graph."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tensor = next(entry for entry in graph.initializer if entry.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.fromfile(folder / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))
    return data.view(kind).reshape(tensor.dims)


def test_each_type_opens_and_gives_the_logits_of_the_merged_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    made = {name: tmp_path / name for name in WORST}
    receipts = export(base, {}, onnx=made, adapter=adapter)
    ids = tiny.random_ids()
    wanted = tiny.torch_logits(base, adapter, ids)
    for name, folder in made.items():
        kld, _ = tiny.divergence(wanted, session.logits(folder, ids))
        print(name, kld)
        assert kld < WORST[name]
        onnx.checker.check_model(str(folder / "model.onnx"))
    assert [receipt.recipe for receipt in receipts] == list(WORST)
    assert receipts[0].bits_per_weight == 32
    for receipt in receipts:
        receipt.check()
        assert receipt.format == "onnx"
        assert receipt.adapter is not None


def test_token_by_token_is_the_same_as_all_at_once(base: Path, tmp_path: Path) -> None:
    export(base, {}, onnx={"f32": tmp_path / "f32"})
    ids = tiny.random_ids()
    whole = session.logits(tmp_path / "f32", ids)
    steps = session.logits(tmp_path / "f32", ids, [100, 5, *[1] * (len(ids) - 105)])
    np.testing.assert_allclose(steps, whole, atol=2e-4)


def test_one_read_feeds_gguf_and_onnx(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(base, {"q8_0": tmp_path / "a.gguf"}, onnx={"int4": tmp_path / "a"}, adapter=adapter)
    export(base, {"q8_0": tmp_path / "b.gguf"}, adapter=adapter)
    export(base, {}, onnx={"int4": tmp_path / "b"}, adapter=adapter)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("settings", [OnnxSettings(), OnnxSettings(64), OnnxSettings(128, symmetric=True)])
def test_codes_are_those_of_the_quantizer(base: Path, tmp_path: Path, settings: OnnxSettings) -> None:
    export(base, {}, onnx={"f32": tmp_path / "f32", "int4": tmp_path / "int4"}, onnx_settings=settings)
    name = "model.layers.1.mlp.down_proj.weight"
    block, symmetric = settings.block or 128, settings.symmetric
    wanted = edgetune_native.quantize_blocks(stored(tmp_path / "f32", name), 4, block_size=block, symmetric=symmetric)
    for suffix, array in zip((".codes", ".scales", ".zero_points"), wanted, strict=True):
        assert array is None or np.array_equal(stored(tmp_path / "int4", name + suffix), array)


def test_the_best_logits_of_a_large_vocabulary_are_computed_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", vocab_size=plan.LARGE_VOCABULARY, hidden_size=128, head_dim=32)
    (receipt,) = export(base, {}, onnx={"int4": tmp_path / "fast"})
    assert receipt.tensors["lm_head.coarse"] == "int4/128"
    monkeypatch.setattr(plan, "LARGE_VOCABULARY", 10**9)
    export(base, {}, onnx={"int4": tmp_path / "full"})
    ids = tiny.random_ids(60)
    fast, full = (session.logits(tmp_path / name, ids) for name in ("fast", "full"))
    # far from the best the first look stands; near it the same matrix was multiplied, by 8-bit and by f32 activations
    best = np.argsort(-full, axis=1)[:, :16]
    near, spread = (np.take_along_axis(fast - full, best, 1), full.std())
    print(np.abs(near).max() / spread, np.abs(fast - full).max() / spread)
    assert np.abs(near).max() < 0.05 * spread
    assert np.abs(fast - full).max() > 0.1 * spread
    assert np.mean(fast.argmax(1) == full.argmax(1)) > 0.9


def test_an_importance_matrix_says_what_the_columns_are_worth(base: Path, tmp_path: Path) -> None:
    """Query rows are turned for llama.cpp, of which the matrix is; its columns are the same."""
    imatrix = imatrices.write(tmp_path / "imatrix.gguf", imatrices.weights(base))
    weights = read_imatrix(imatrix).entries
    made = {"f32": tmp_path / "f32", "int4": tmp_path / "int4"}
    _, receipt = export(base, {}, onnx=made, imatrix=imatrix, onnx_settings=OnnxSettings(32, symmetric=True))
    assert receipt.imatrix is not None
    assert receipt.imatrix["file"] == "imatrix.gguf"
    for part, slot in (("attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        name = f"model.layers.2.{part}.weight"
        rows = stored(tmp_path / "int4", name + ".codes"), stored(tmp_path / "int4", name + ".scales")
        source = stored(tmp_path / "f32", name) if part != "attn.q_proj" else None
        if source is None:
            source = stored(tmp_path / "f32", "model.layers.2.attn.qkv_proj.weight")[: rows[0].shape[0]]
        wanted = edgetune_native.quantize_blocks(source, 4, block_size=32, weights=weights[f"blk.2.{slot}.weight"])
        plain = edgetune_native.quantize_blocks(source, 4, block_size=32)
        assert np.array_equal(rows[0], wanted.codes)
        assert np.array_equal(rows[1], wanted.scales)
        assert not np.array_equal(rows[0], plain.codes)


def test_only_some_positions_are_computed_on_demand(base: Path, tmp_path: Path) -> None:
    export(base, {}, onnx={"f32": tmp_path / "f32"})
    ids = tiny.random_ids()
    whole = session.logits(tmp_path / "f32", ids)
    part = session.logits(tmp_path / "f32", ids, wanted=(50, 60))
    assert part.shape == (10, whole.shape[1])
    np.testing.assert_allclose(part, whole[50:60], atol=1e-5)


def test_the_graph_holds_no_weights_and_says_where_they_are_from(base: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {}, onnx={"int4": tmp_path / "int4"})
    graph = onnx.load(tmp_path / "int4" / "model.onnx", load_external_data=False)
    assert all(len(entry.raw_data) < 1024 for entry in graph.graph.initializer)
    said = {entry.key: entry.value for entry in graph.metadata_props}
    data = tmp_path / "int4" / "model.onnx.data"
    assert int(said["edgetune.data.size"]) == data.stat().st_size
    assert said["edgetune.data.sha256"] == receipt.files["model.onnx.data"]
    assert json.loads(said["edgetune.receipt"])["edgetune.recipe"] == "int4"
    places = [{e.key: e.value for e in entry.external_data} for entry in graph.graph.initializer]
    assert all(int(place["offset"]) % 4096 == 0 for place in places if place)


def test_the_plan_is_what_is_written(base: Path, tmp_path: Path) -> None:
    (found,) = plan_onnx(base, ["int4"])
    (receipt,) = export(base, {}, onnx={"int4": tmp_path / "int4"})
    assert receipt.tensors == {row.name: row.type for row in found.rows}
    assert receipt.bits_per_weight == round(found.bits_per_weight, 4)
    by_name = {row.name: row for row in found.rows}
    head = by_name["model.embed_tokens.weight"]
    assert head.type == "int8/32"
    assert head.reason == "rows of 96 are not a multiple of 128, as a lookup needs"
    assert by_name["model.layers.0.mlp.down_proj.weight"].type == "int4/128z"
    assert by_name["model.layers.0.attn.q_proj.weight"].type == "int4/32z"
    assert by_name["model.layers.0.attn.v_proj.weight"].type == "int8/128"


def test_rows_that_are_no_blocks_are_reported_and_refused(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", hidden_size=100, head_dim=32)
    (found,) = plan_onnx(base, ["int4"])
    row = next(row for row in found.rows if row.name == "model.embed_tokens.weight")
    assert (row.type, row.fallback) == ("f16", True)
    with pytest.raises(RecipeError, match="rows of 100 weights do not divide into blocks"):
        export(base, {}, onnx={"int4": tmp_path / "int4"})
    export(base, {}, onnx={"int4": tmp_path / "int4"}, allow_fallback=True)
    ids = tiny.random_ids()
    kld, _ = tiny.divergence(tiny.torch_logits(base, None, ids), session.logits(tmp_path / "int4", ids))
    assert kld < WORST["int4"]


def test_wrong_types_and_foreign_directories_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ONNX cannot be written as 'q4_k_m'"):
        export(base, {}, onnx={"q4_k_m": tmp_path / "x"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(EdgetuneError, match="not made by an export"):
        export(base, {}, onnx={"int4": tmp_path / "mine"})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_was_exported_gives_way(base: Path, tmp_path: Path) -> None:
    export(base, {}, onnx={"int4": tmp_path / "x"})
    export(base, {}, onnx={"int8": tmp_path / "x"})
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.replaced"))
