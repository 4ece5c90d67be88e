"""Receipts of this and of other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune_converters.errors import ArtifactError
from edgetune_converters.provenance.receipts import VERSION, Receipt

# as edgetune wrote it before receipts had a version
FIRST = {
    "artifact": "m-int4-onnx", "sha256": "ab", "size": 9, "format": "onnx", "recipe": "int4", "architecture": "llama",
    "base": {"model.safetensors": "cd"}, "adapter": None, "merge_base": "original", "types": {"int4/32": 9},
    "tensors": {"lm_head": "int4/32"}, "weights": 2, "bits_per_weight": 36, "fallback_share": 0.0, "tokenizer": {},
    "notes": [], "survival": None, "overrides": [], "files": {"model.onnx": "ef"}, "imatrix": None,
    "merge_base_kld": None, "tuning": {"kld_tuned": 0.5}, "exporter": None, "exporter_kld": None,
    "versions": {"numpy": "2.0"},
}  # fmt: skip


def stored(tmp_path: Path, content: dict[str, Any]) -> Path:
    artifact = tmp_path / "m-int4-onnx"
    (tmp_path / "m-int4-onnx.receipt.json").write_text(json.dumps(content))
    return artifact


def test_a_receipt_without_a_version_is_read(tmp_path: Path) -> None:
    artifact = stored(tmp_path, FIRST)
    receipt = Receipt.read(artifact)
    assert receipt.type_search == {"kld_tuned": 0.5}
    assert receipt.files == {"model.onnx": "ef"}
    assert receipt.artifact == str(artifact)
    receipt.write()
    written = json.loads((tmp_path / "m-int4-onnx.receipt.json").read_text())
    assert written["version"] == VERSION
    assert written["artifact"] == "m-int4-onnx"
    assert "tuning" not in written
    assert Receipt.read(artifact) == receipt


def test_a_receipt_that_lacks_what_came_later_is_read(tmp_path: Path) -> None:
    later = ("notes", "survival", "overrides", "files", "imatrix", "merge_base_kld", "tuning", "exporter", "versions")
    receipt = Receipt.read(stored(tmp_path, {key: value for key, value in FIRST.items() if key not in later}))
    assert receipt.versions == {}
    assert receipt.type_search is None


def test_a_newer_receipt_is_refused_in_a_sentence(tmp_path: Path) -> None:
    artifact = stored(tmp_path, {"version": VERSION + 1})
    with pytest.raises(ArtifactError, match=rf"of version {VERSION + 1}; this edgetune reads versions up to {VERSION}"):
        Receipt.read(artifact)


def test_keys_of_a_later_edgetune_of_the_same_version_are_ignored(tmp_path: Path) -> None:
    assert Receipt.read(stored(tmp_path, {**FIRST, "version": VERSION, "weather": "fine"})).type_search is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "2"), ("version", True), ("version", 0), ("size", "9"), ("size", True), ("types", {"q8_0": "9"}),
        ("types", []), ("notes", [1]), ("adapter", {"a": None}), ("bits_per_weight", None), ("sha256", None),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"is not a receipt: .*{key}"):
        Receipt.read(stored(tmp_path, {**FIRST, key: value}))


def test_an_artifact_without_a_receipt_has_none(tmp_path: Path) -> None:
    assert Receipt.read_if_present(tmp_path / "x.gguf") is None
