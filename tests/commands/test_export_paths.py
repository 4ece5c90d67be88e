"""What an export writes and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.config import ExportConfig
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.exporting.options import byte_count, check_overrides, check_used, resolve
from edgetune.exporting.targets import Outputs, outputs_of, refuse_existing

HERE = Path("here")


def outputs(output: str | None, formats: list[str], types: list[str], given: bool = True) -> Outputs:
    config = ExportConfig.model_validate({"formats": formats, "types": types})
    return outputs_of(config, "m", HERE, (output and Path(output)) or None, given)


def test_names() -> None:
    assert outputs(None, ["gguf"], ["q4_k_m", "f16"]).paths == [HERE / "m-q4_k_m.gguf", HERE / "m-f16.gguf"]
    assert outputs("x.gguf", ["gguf"], ["q4_k_m"]).gguf == {"q4_k_m": Path("x.gguf")}
    assert outputs("x.gguf", ["gguf-lora"], ["f16"]).lora == {"f16": Path("x.gguf")}
    assert outputs("x", ["safetensors"], ["f16"]).safetensors == {"f16": Path("x")}
    found = outputs("x", ["gguf", "safetensors", "gguf-lora"], ["q4_k_m", "bf16"])
    assert found.gguf == {"q4_k_m": Path("x/m-q4_k_m.gguf"), "bf16": Path("x/m-bf16.gguf")}
    assert (found.safetensors, found.lora) == ({"bf16": Path("x/m-bf16")}, {"bf16": Path("x/m-lora-bf16.gguf")})


def test_the_types_of_a_run_do_not_hinder_other_formats() -> None:
    assert outputs(None, ["safetensors"], ["q4_k_m"], given=False).safetensors == {"base": HERE / "m-merged"}
    with pytest.raises(ConfigError, match="q4_k_m is a type of gguf, not of safetensors"):
        outputs(None, ["safetensors"], ["q4_k_m"])


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
        outputs(output, formats, types)


def test_parts_of_a_split_file_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m-q8_0-00001-of-00002.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="-00001-of-00002"):
        refuse_existing([tmp_path / "m-q8_0.gguf"], overwrite=False)
    refuse_existing([tmp_path / "m-q8_0.gguf"], overwrite=True)


def test_a_flag_goes_before_the_run() -> None:
    flags: dict[str, Any] = {"formats": "GGUF, safetensors", "types": None, "tensor_types": (), "allow_fallback": False}
    config = resolve({"types": ["f16"], "tensor_types": ["a=f16"], "allow_fallback": True}, flags)
    assert (config.formats, config.types) == (["gguf", "safetensors"], ["f16"])
    assert (config.tensor_types, config.allow_fallback) == (["a=f16"], True)
    with pytest.raises(EdgetuneError, match="formats"):
        resolve({}, {"formats": "ggml"})


@pytest.mark.parametrize(("text", "size"), [("2G", 2 * 10**9), ("1.5MB", 1_500_000), ("700", 700), ("3 kb", 3000)])
def test_sizes(text: str, size: int) -> None:
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
        check_overrides(config, Outputs({}, {}, {}, ONNX), {option: value})


def test_types_set_by_hand_are_said_to_change_nothing_beside_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    """And so where the run's configuration sets them, and another format is asked for today."""
    config = ExportConfig.model_validate({"tensor_types": ["a=q8_0"]})
    gguf = {"q4_k_m": Path("x.gguf")}
    check_overrides(config, Outputs(gguf, {}, {}, {}), {"tensor_types": ("a=q8_0",)})
    assert capsys.readouterr().err == ""
    for outputs, flags in (
        (Outputs(gguf, {}, {}, ONNX), {"tensor_types": ("a=q8_0",)}),
        (Outputs({}, {}, {}, ONNX), {"tensor_types": ()}),
    ):
        check_overrides(config, outputs, flags)
        said = capsys.readouterr().err
        assert "--tensor-type" in said
        assert "changes nothing in x-int4-onnx" in said


@pytest.mark.parametrize(
    ("outputs", "idle", "useful"),
    [
        (Outputs({"q8_0": Path("x.gguf")}, {}, {}, {}),
         ("block_size", "symmetric", "portable", "max_shard_size"), ("split_max_size", "modelfile")),
        (Outputs({}, {}, {}, {"f16": Path("x")}),
         ("block_size", "symmetric", "max_shard_size", "split_max_size", "modelfile"), ("portable",)),
        (Outputs({}, {"bf16": Path("x")}, {}, {"int4": Path("y")}),
         ("split_max_size", "modelfile"), ("block_size", "symmetric", "portable", "max_shard_size")),
    ],
)  # fmt: skip
def test_a_flag_without_a_use_is_refused(outputs: Outputs, idle: tuple[str, ...], useful: tuple[str, ...]) -> None:
    check_used(outputs, dict.fromkeys(useful, "given") | dict.fromkeys(idle))
    for field in idle:
        with pytest.raises(ConfigError, match=rf"^--{field.replace('_', '-')} is for .* alone, and none is asked for"):
            check_used(outputs, {field: "given"})
