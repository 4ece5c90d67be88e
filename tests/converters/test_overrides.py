"""Overrides and importance matrices: the bytes of llama-quantize, and one sentence for what cannot be meant."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters import gguf
from edgetune_converters.errors import RecipeError
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.quantization.imatrix import ImportanceMatrix, read_imatrix
from edgetune_converters.quantization.overrides import overrides_of
from edgetune_converters.quantization.recipes import RECIPES
from tests.converters import family_models, imatrices, runtime, tiny
from tests.converters.imatrices import Weights
from tests.export_requests import export, plan_gguf

_DEEP: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama", tmp_path_factory.mktemp("untied"), **_DEEP)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("qwen3", tmp_path_factory.mktemp("tied"), **_DEEP)


# overrides: tensor types, output, embedding
CHOICES: dict[str, tuple[list[str], str | None, str | None]] = {
    "ends": ([], "q5_0", "q8_0"),
    "output only": ([], "q4_0", None),
    "embedding only": ([], None, "q2_k"),
    "by name": (["attn_v=q8_0", r"blk\.(1|3)\.ffn_down=f16", "attn=iq4_nl"], None, None),
    # the mix counts what is left to it
    "the mix is shifted": ([r"blk\.0\.attn_v=q4_0", r"blk\.2\.ffn_down=q4_0"], None, None),
    "all three": (["token_embd=q4_0", "output=q4_1", "ffn=q5_1"], "q6_k", "q3_k"),
    "tied by name": (["token_embd=q4_1"], "q6_k", None),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_overrides_give_the_bytes_of_llama_quantize(
    model: str, choice: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(model)
    patterns, output, embedding = CHOICES[choice]
    files = {name: tmp_path / f"ours.{name}.gguf" for name in ("q4_k_m",)}
    export(base, {"f32": tmp_path / "f32.gguf"})
    (receipt,) = export(base, files, overrides=overrides_of(patterns, output, embedding), allow_fallback=True)
    pairs = [(text.rpartition("=")[0], BY_NAME[text.rpartition("=")[2]].id) for text in patterns]
    runtime.quantize(
        tmp_path / "f32.gguf", tmp_path / "theirs.gguf", RECIPES["q4_k_m"].file_type, tensor_types=pairs,
        output_type=_number(output), embedding_type=_number(embedding),
    )  # fmt: skip
    _assert_equal(files["q4_k_m"], tmp_path / "theirs.gguf")
    assert len(receipt.overrides) == len(patterns) + (output is not None) + (embedding is not None)
    assert gguf.read(files["q4_k_m"]).metadata["edgetune.overrides"] == receipt.overrides


_NARROW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _NARROW | {"head_dim": 32},
    "mixtral-of-eight": _NARROW | {"head_dim": 32, "num_local_experts": 8},
    "qwen2moe": _NARROW | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "deepseek-v2": {"first_k_dense_replace": 2, "num_hidden_layers": 9},
    "gpt-oss": _NARROW | {"head_dim": 32},
}
EXPERT_CHOICES = (
    [r"blk\.0\.ffn_down_exps=q4_0"],
    [r"blk\.[0-4]\.ffn_down=q5_0"],
    [r"ffn_down_shexp=q4_1", r"blk\.3\.ffn_down=q5_1", r"blk\.1\.attn_v=q8_0"],
)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mix_continues_around_overridden_experts(name: str, tmp_path: Path) -> None:
    """How the mix counts layers with experts when the type of some was given by hand."""
    base = family_models.base(name.removesuffix("-of-eight"), tmp_path / "base", **EXPERTS[name])
    export(base, {"f32": tmp_path / "f32.gguf"})
    names = {entry.name for entry in gguf.read(tmp_path / "f32.gguf").tensors}
    kinds = ("q3_k_m", "q4_k_m", "q4_k_s")
    for patterns in EXPERT_CHOICES:
        split = [text.rpartition("=") for text in patterns]
        chosen = [text for text, (regex, _, _) in zip(patterns, split, strict=True) if _found(regex, names)]
        if not chosen:
            continue
        files = {kind: tmp_path / f"{kind}.gguf" for kind in kinds}
        export(base, files, overrides=overrides_of(chosen), allow_fallback=True)
        pairs = [(regex, BY_NAME[type_].id) for regex, _, type_ in split]
        for kind, path in files.items():
            theirs = tmp_path / "theirs.gguf"
            runtime.quantize(tmp_path / "f32.gguf", theirs, RECIPES[kind].file_type, tensor_types=pairs)
            _assert_equal(path, theirs)


def _found(regex: str, names: set[str]) -> bool:
    return any(re.search(regex, name) for name in names)


def _number(name: str | None) -> int | None:
    return None if name is None else BY_NAME[name].id


def _assert_equal(ours: Path, theirs: Path) -> None:
    one, other = gguf.read(ours), gguf.read(theirs)
    assert {entry.name: entry.type for entry in one.tensors} == {entry.name: entry.type for entry in other.tensors}
    for entry in one.tensors:
        assert np.array_equal(one.tensor(entry.name), other.tensor(entry.name)), entry.name


def test_the_plan_names_the_override(untied: Path) -> None:
    overrides = overrides_of(["attn_v=Q8_0"], "f16", None)
    (plan,) = plan_gguf(untied, ["f16"], overrides=overrides)
    reasons = {row.name: (row.type, row.reason) for row in plan.rows}
    assert reasons["blk.3.attn_v.weight"] == ("q8_0", "--tensor-type attn_v=Q8_0")
    assert reasons["output.weight"] == ("f16", "--output-tensor-type f16")
    assert reasons["blk.3.attn_k.weight"] == ("f16", "the recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v", "is not of the form REGEX=TYPE"),
        ("=q8_0", "is not of the form REGEX=TYPE"),
        ("attn_v=", "is not of the form REGEX=TYPE"),
        ("attn_(v=q8_0", "'attn_\\(v' is not a regular expression: missing"),
        ("attn_v=q9_9", "'q9_9' is not a type of a tensor"),
        ("attn_v=q4_k_m", "'q4_k_m' is not a type of a tensor"),
        ("attn_w=q8_0", "it matches no tensor of this model"),
        ("attn_norm=q8_0", "it matches only vectors such as blk.0.attn_norm.weight"),
        ("attn_v=iq2_xxs", "without an importance matrix"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(text: str, message: str, untied: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        export(untied, {"q8_0": tmp_path / "x.gguf"}, overrides=overrides_of([text]))
    assert list(tmp_path.iterdir()) == []


def test_an_override_that_fits_no_block_is_a_fallback(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    with pytest.raises(RecipeError, match="rows of 160 weights"):
        export(base, {"q8_0": tmp_path / "x.gguf"}, overrides=overrides_of(["ffn_down=q4_k"]))


# -- importance matrices -----------------------------------------------------------------------------------------------


def _write_legacy(path: Path, weights: Weights, calls: int = 5) -> Path:
    parts = [struct.pack("<i", len(weights))]
    for name, values in weights.items():
        sums = values * np.float32(calls)
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)))
        parts.append(sums.tobytes())
    parts.append(struct.pack("<ii", 11, 4) + b"data")
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_an_importance_matrix_gives_the_bytes_of_llama_quantize(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(model)
    names = ["q4_k_m", "q4_0", "q5_0", "iq4_xs", "iq4_nl", "q3_k_s"]
    imatrix = imatrices.write(tmp_path / "imatrix.gguf", imatrices.weights(base))
    read = read_imatrix(imatrix)
    files = {name: tmp_path / f"{name}.gguf" for name in names}
    receipts = export(base, {**files, "f32": tmp_path / "f32.gguf"}, imatrix=imatrix)
    plain = export(base, {"q4_k_m": tmp_path / "plain.gguf"})
    assert plain[0].sha256 != receipts[0].sha256
    for name in names:
        theirs = tmp_path / "theirs.gguf"
        runtime.quantize(tmp_path / "f32.gguf", theirs, RECIPES[name].file_type, imatrix=read.entries)
        _assert_equal(files[name], theirs)
    metadata = gguf.read(files["q4_k_m"]).metadata
    assert metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert metadata["quantize.imatrix.dataset"] == "calibration.txt"
    assert metadata["quantize.imatrix.chunks_count"] == 7
    assert receipts[0].imatrix == {"file": "imatrix.gguf", "sha256": read.sha256}
    assert any("no entry for token_embd.weight: llama-imatrix leaves" in note for note in receipts[0].notes)


def test_types_that_need_an_importance_matrix_are_written_with_one(untied: Path, tmp_path: Path) -> None:
    imatrix = imatrices.write(tmp_path / "imatrix.gguf", imatrices.weights(untied))
    overrides = overrides_of(["ffn_up=iq2_xxs", "ffn_gate=iq3_xxs", "attn_q=iq2_s", "attn_k=iq1_m"])
    export(untied, {"q4_k_m": tmp_path / "x.gguf", "f32": tmp_path / "f.gguf"}, imatrix=imatrix, overrides=overrides)
    assert {"iq2_xxs", "iq3_xxs", "iq2_s", "iq1_m"} < {e.type for e in gguf.read(tmp_path / "x.gguf").tensors}
    runtime.logits(tmp_path / "x.gguf", tiny.random_ids(8))


def test_both_formats_hold_the_same(untied: Path, tmp_path: Path) -> None:
    weights = imatrices.weights(untied)
    new = read_imatrix(imatrices.write(tmp_path / "new.gguf", weights))
    old = read_imatrix(_write_legacy(tmp_path / "old.dat", weights))
    assert new.entries.keys() == old.entries.keys() == weights.keys()
    for name in weights:
        np.testing.assert_allclose(new.entries[name], weights[name], rtol=1e-6)
        np.testing.assert_allclose(old.entries[name], weights[name], rtol=1e-6)
    assert (old.dataset, old.chunks, new.chunks) == ("data", 11, 7)


def test_experts_have_weights_of_their_own() -> None:
    weights = np.arange(8, dtype=np.float32)
    rows = np.zeros((4, 4), np.float32)
    importance = ImportanceMatrix(Path("x"), "", {"e": weights}, None, 0)
    pieces = [
        (len(part), [] if chosen is None else list(chosen))
        for part, chosen in importance.pieces("e", (2, 3, 4), 1, rows)
    ]
    assert pieces == [(2, [0, 1, 2, 3]), (2, [4, 5, 6, 7])]


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "negative", "foreign", "narrow"])
def test_importance_matrices_that_cannot_be_used_are_refused(damage: str, untied: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "imatrix.dat", imatrices.weights(untied)
    if damage == "negative":
        weights["output.weight"][0] = -1
    if damage == "foreign":
        weights = {"other." + name: values for name, values in weights.items()}
    if damage == "narrow":
        weights["output.weight"] = weights["output.weight"][:-1]
    whole = _write_legacy(path, weights).read_bytes()
    contents = {"empty": b"", "text": b"hello, this is no matrix" * 9, "truncated": whole[:5000]}
    path.write_bytes(contents.get(damage, whole))
    if damage == "missing":
        path.unlink()
    with pytest.raises(RecipeError):
        export(untied, {"q4_k_m": tmp_path / "x.gguf"}, imatrix=path)
    assert not (tmp_path / "x.gguf").exists()
