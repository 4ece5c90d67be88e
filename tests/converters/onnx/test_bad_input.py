"""What an ONNX export refuses, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from edgetune_converters.errors import CheckpointError, EdgetuneError, RecipeError, TokenizerError
from tests.converters import tiny
from tests.export_requests import export


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.base("llama-tied", tmp_path / "base", head_dim=32)


def refused(base: Path, kind: type[EdgetuneError], message: str, out: Path, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        export(base, {}, onnx={"int4": out}, **options)
    assert not list(out.parent.glob(out.name + "*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(value: float, base: Path, tmp_path: Path) -> None:
    path = base / "model.safetensors"
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, path, {"format": "pt"})
    refused(base, CheckpointError, "down_proj.weight holds 1 weights that are NaN or infinite", tmp_path / "out")


def test_a_model_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").unlink()
    refused(base, TokenizerError, "has no tokenizer", tmp_path / "out")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_gguf_file_as_the_base_gives_the_weights_of_its_own_base(
    base: Path, tmp_path: Path, has_tokenizer: bool
) -> None:
    export(base, {"f32": tmp_path / "base.gguf"})
    export(tmp_path / "base.gguf", {}, onnx={"f32": tmp_path / "one"}, tokenizer=base if has_tokenizer else None)
    export(base, {}, onnx={"f32": tmp_path / "other"})
    one, other = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("one", "other"))
    assert one == other


def test_types_and_paths_that_cannot_be(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ONNX cannot be written as 'q8_0'"):
        export(base, {}, onnx={"q8_0": tmp_path / "out"})
    with pytest.raises(EdgetuneError, match="two outputs would be written"):
        export(base, {}, onnx={"int4": tmp_path / "out", "int8": tmp_path / "out"})
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EdgetuneError, match="is a file; an ONNX model is a directory"):
        export(base, {}, onnx={"int4": tmp_path / "out"})
