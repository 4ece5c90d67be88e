"""The request for an export, its plan, and the public names of the package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import edgetune_converters
from edgetune_converters import ExportRequest, RecipeError, Target, plan
from edgetune_converters.quantization.overrides import overrides_of
from tests.converters import tiny


def test_a_trial_has_nothing_that_concerns_the_final_artifacts_alone() -> None:
    request = ExportRequest(
        Path("base"), (Target("gguf", "q8_0", Path("a.gguf")),), adapter=Path("adapter"), merge_base="nf4",
        split_max_size=1, measure_survival=True, metadata={"a": "b"}, write_receipts=True, threads=2,
    )  # fmt: skip
    trial = request.for_trial(Target("onnx", "int4", Path("x")))
    reset = {"targets", "split_max_size", "measure_survival", "metadata", "write_receipts"}
    assert trial.paths("onnx") == {"int4": Path("x")}
    assert trial.paths("gguf") == {}
    for each in fields(request):
        assert (getattr(trial, each.name) == getattr(request, each.name)) == (each.name not in reset), each.name


def test_the_plan_has_every_target_in_order(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    targets = [
        Target("onnx", "int4", tmp_path / "o"), Target("gguf", "q8_0", tmp_path / "a.gguf"),
        Target("safetensors", "bf16", tmp_path / "m"), Target("gguf-lora", "f32", tmp_path / "l.gguf"),
    ]  # fmt: skip
    request = ExportRequest(base, tuple(targets), adapter=tiny.adapter(base, tmp_path / "adapter"))
    assert [each.recipe.name for each in plan(request)] == ["int4", "q8_0", "safetensors, bf16", "gguf-lora, f32"]
    (changed,) = plan(replace(request, targets=(targets[1],), overrides=overrides_of(["attn_v=f16"])))
    assert {row.type for row in changed.rows if "attn_v.weight" in row.name} == {"f16"}
    with pytest.raises(RecipeError, match="q9"):
        plan(replace(request, targets=(Target("gguf", "q9", tmp_path / "x"),)))


def test_the_package_offers_its_public_names_without_loading_anything() -> None:
    for name in edgetune_converters.__all__:
        assert callable(getattr(edgetune_converters, name))
    with pytest.raises(AttributeError, match="has no attribute 'exports'"):
        _ = edgetune_converters.exports
    code = "import sys, edgetune_converters; assert not {'numpy', 'edgetune_converters.exporting'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
