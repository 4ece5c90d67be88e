"""What an export writes and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.commands.export_options import byte_count, resolve
from edgetune.commands.export_paths import Outputs, outputs_of, refuse_existing
from edgetune.config import ExportConfig
from edgetune.errors import ConfigError, EdgetuneError

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
