"""What an export writes and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.config import ExportConfig
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.exporting import targets as naming
from edgetune.exporting.options import resolve_options
from edgetune.exporting.request import check_overrides, check_used
from edgetune.exporting.targets import refuse_existing, targets_of
from edgetune.planning.export_checks import byte_count
from edgetune_converters.formats import FORMATS
from edgetune_converters.planning import PLANNERS
from edgetune_converters.request import Target
from tests.export_requests import targets

HERE = Path("here")


def found(output: str | None, formats: list[str], types: list[str], given: bool = True) -> dict[str, dict[str, Path]]:
    """Format -> type -> path."""
    config = ExportConfig.model_validate({"formats": formats, "types": types})
    paths: dict[str, dict[str, Path]] = {}
    for target in targets_of(config, "m", HERE, (output and Path(output)) or None, given):
        paths.setdefault(target.format, {})[target.type] = target.path
    return paths


def test_artifacts_are_named_by_model_format_and_type() -> None:
    assert found(None, ["gguf"], ["q4_k_m", "f16"]) == {
        "gguf": {"q4_k_m": HERE / "m-q4_k_m.gguf", "f16": HERE / "m-f16.gguf"}
    }
    assert found("x.gguf", ["gguf"], ["q4_k_m"]) == {"gguf": {"q4_k_m": Path("x.gguf")}}
    assert found("x.gguf", ["gguf-lora"], ["f16"]) == {"gguf-lora": {"f16": Path("x.gguf")}}
    assert found("x", ["safetensors"], ["f16"]) == {"safetensors": {"f16": Path("x")}}
    assert found("x", ["gguf-lora", "safetensors", "gguf"], ["q4_k_m", "bf16"]) == {
        "gguf": {"q4_k_m": Path("x/m-q4_k_m.gguf"), "bf16": Path("x/m-bf16.gguf")},
        "safetensors": {"bf16": Path("x/m-bf16")},
        "gguf-lora": {"bf16": Path("x/m-lora-bf16.gguf")},
    }
    assert found(None, ["onnx", "gguf-lora"], ["q8_0"], given=False) == {
        "gguf-lora": {"f32": HERE / "m-lora.gguf"}, "onnx": {"int4": HERE / "m-int4-onnx"}
    }  # fmt: skip


def test_the_types_of_a_run_do_not_hinder_other_formats() -> None:
    assert found(None, ["safetensors"], ["q4_k_m"], given=False) == {"safetensors": {"base": HERE / "m-merged"}}
    with pytest.raises(ConfigError, match="q4_k_m is a type of gguf, not of safetensors"):
        found(None, ["safetensors"], ["q4_k_m"])


def test_every_format_has_names_of_artifacts_and_a_plan() -> None:
    assert set(naming._NAMES) == set(FORMATS), "_NAMES in edgetune/exporting/targets.py"
    assert set(PLANNERS) == set(FORMATS), "PLANNERS in edgetune_converters/planning.py"


def test_formats_have_the_types_that_the_converters_can_write() -> None:
    """FORMATS names the types of ONNX without importing onnx."""
    from edgetune_converters.onnx.plan import RECIPES

    assert set(FORMATS["onnx"].types) == set(RECIPES), "edgetune_converters/formats.py repeats the names of RECIPES"
    for format_ in FORMATS.values():
        for type_ in (*format_.types, format_.default_type):
            format_.check_type(type_)


@pytest.mark.parametrize(
    ("output", "formats", "types", "message"),
    [
        ("x.gguf", ["gguf"], ["f16", "q8_0"], "2 types cannot be written to one file"),
        ("x.gguf", ["safetensors"], ["f16"], "safetensors is a directory"),
        (None, ["gguf"], [], "names no type"),
        (None, ["gguf"], ["q8_0", "int4"], "int4 is a type of onnx, not of gguf"),
        (None, ["onnx"], ["q5_km"], "'q5_km' is not a storage type that can be written, did you mean q5_k_m"),
        (None, ["gguf", "onnx"], ["q8_0"], "q8_0: none of them is a type of onnx"),
    ],
)
def test_what_has_no_place(output: str | None, formats: list[str], types: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(output, formats, types)


def test_parts_of_a_split_file_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m-q8_0-00001-of-00002.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="-00001-of-00002"):
        refuse_existing([tmp_path / "m-q8_0.gguf"], overwrite=False)
    refuse_existing([tmp_path / "m-q8_0.gguf"], overwrite=True)


def test_a_flag_goes_before_the_run() -> None:
    flags: dict[str, Any] = {"formats": "GGUF, safetensors", "types": None, "tensor_types": (), "allow_fallback": False}
    config = resolve_options({"types": ["f16"], "tensor_types": ["a=f16"], "allow_fallback": True}, flags)
    assert (config.formats, config.types) == (["gguf", "safetensors"], ["f16"])
    assert (config.tensor_types, config.allow_fallback) == (["a=f16"], True)
    with pytest.raises(EdgetuneError, match="formats"):
        resolve_options({}, {"formats": "ggml"})


def test_a_flag_goes_before_the_key_of_an_old_run() -> None:
    assert resolve_options({"tune": True}, {}).search_types
    assert resolve_options({"tune": False}, {"search_types": True}).search_types


@pytest.mark.parametrize(("text", "size"), [("2G", 2 * 10**9), ("1.5MB", 1_500_000), ("700", 700), ("3 kb", 3000)])
def test_byte_counts_take_a_unit_and_wrong_ones_are_refused(text: str, size: int) -> None:
    assert byte_count(text, "--split-max-size") == size
    for wrong in ("", "G", "-1", "0", "1X"):
        with pytest.raises(ConfigError, match="--split-max-size"):
            byte_count(wrong, "--split-max-size")


ONNX = {"int4": Path("x-int4-onnx")}


@pytest.mark.parametrize("option", ["tensor_types", "output_tensor_type", "token_embedding_type"])
def test_types_set_by_hand_are_refused_where_no_output_takes_them(option: str) -> None:
    value: Any = ["a=q8_0"] if option == "tensor_types" else "q8_0"
    config = ExportConfig.model_validate({option: value})
    with pytest.raises(ConfigError, match="types of a GGUF file alone"):
        check_overrides(config, targets(onnx=ONNX), {option: value})


def test_types_set_by_hand_are_said_to_change_nothing_beside_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    """And so where the run's configuration sets them, and another format is asked for today."""
    config = ExportConfig.model_validate({"tensor_types": ["a=q8_0"]})
    gguf = {"q4_k_m": Path("x.gguf")}
    check_overrides(config, targets(gguf), {"tensor_types": ("a=q8_0",)})
    assert capsys.readouterr().err == ""
    for exported, flags in (
        (targets(gguf, onnx=ONNX), {"tensor_types": ("a=q8_0",)}),
        (targets(onnx=ONNX), {"tensor_types": ()}),
    ):
        check_overrides(config, exported, flags)
        said = capsys.readouterr().err
        assert "--tensor-type" in said
        assert "changes nothing in x-int4-onnx" in said


@pytest.mark.parametrize(
    ("outputs", "idle", "useful"),
    [
        (targets({"q8_0": Path("x.gguf")}),
         ("block_size", "symmetric", "portable", "max_shard_size"), ("split_max_size", "modelfile")),
        (targets(onnx={"f16": Path("x")}),
         ("block_size", "symmetric", "max_shard_size", "split_max_size", "modelfile"), ("portable",)),
        (targets(safetensors={"bf16": Path("x")}, onnx={"int4": Path("y")}),
         ("split_max_size", "modelfile"), ("block_size", "symmetric", "portable", "max_shard_size")),
    ],
)  # fmt: skip
def test_a_flag_without_a_use_is_refused(
    outputs: tuple[Target, ...], idle: tuple[str, ...], useful: tuple[str, ...]
) -> None:
    check_used(outputs, dict.fromkeys(useful, "given") | dict.fromkeys(idle))
    for field in idle:
        with pytest.raises(ConfigError, match=rf"^--{field.replace('_', '-')} is for .* alone, and none is exported"):
            check_used(outputs, {field: "given"})
