"""The options of an export: declared once in the configuration, and taken from there by the command line.

A flag's help is the description of its field, and a flag that is given goes before the field of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from edgetune import console
from edgetune.config import ExportConfig
from edgetune.errors import ConfigError
from edgetune.exporting.targets import Outputs

Command = TypeVar("Command", bound=Callable[..., Any])

# field -> flags and what click must know beside the help
_FLAGS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "formats": (("--format",), {"metavar": "LIST"}),
    "types": (("-q", "--type"), {"metavar": "LIST"}),
    "tensor_types": (("--tensor-type",), {"metavar": "REGEX=TYPE", "multiple": True}),
    "output_tensor_type": (("--output-tensor-type", "--output-type"), {"metavar": "TYPE"}),
    "token_embedding_type": (("--token-embedding-type",), {"metavar": "TYPE"}),
    "imatrix": (("--imatrix",), {"metavar": "FILE"}),
    "split_max_size": (("--split-max-size",), {"metavar": "SIZE"}),
    "max_shard_size": (("--max-shard-size",), {"metavar": "SIZE"}),
    "modelfile": (("--modelfile",), {"is_flag": True}),
    "card": (("--card",), {"is_flag": True}),
    "survival": (("--survival",), {"is_flag": True}),
    "allow_fallback": (("--allow-fallback",), {"is_flag": True}),
    "block_size": (("--block-size",), {"type": click.Choice(["32", "64", "128"])}),
    "symmetric": (("--symmetric",), {"is_flag": True}),
    "tune": (("--tune",), {"is_flag": True}),
    "portable": (("--portable",), {"is_flag": True}),
    "merge_base": (("--merge-base",), {"type": click.Choice(["original", "nf4", "auto"])}),
}
_BY_HAND = ("tensor_types", "output_tensor_type", "token_embedding_type")
_GGUF = ("a GGUF file", "--format gguf", lambda outputs: outputs.gguf)
_CODES = ("int4 or int8 in ONNX", "--format onnx -q int4", lambda outputs: {"int4", "int8"} & outputs.onnx.keys())
# field -> what alone it is for, how to ask for that, and whether it is there
_ONLY_FOR: Mapping[str, tuple[str, str, Callable[[Outputs], object]]] = {
    "block_size": _CODES,
    "symmetric": _CODES,
    "portable": ("ONNX", "--format onnx", lambda outputs: outputs.onnx),
    "max_shard_size": ("a safetensors directory", "--format safetensors", lambda outputs: outputs.safetensors),
    "split_max_size": _GGUF,
    "modelfile": _GGUF,
}
_LISTS = ("formats", "types")
_NUMBERS = ("block_size",)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def options(command: Command) -> Command:
    """Decorate a command with a flag for every field of the `export:` section."""
    for field, (names, details) in reversed(list(_FLAGS.items())):
        described = ExportConfig.model_fields[field].description
        command = click.option(*names, field, help=described, **details)(command)
    return command


def resolve(stored: Mapping[str, Any], flags: Mapping[str, Any]) -> ExportConfig:
    """The run's section with the flags over it. Errors: ConfigError for a value that no field takes."""
    from edgetune.config import parse_section

    given = {field: _value(field, value) for field, value in flags.items() if value not in (None, (), False)}
    return parse_section(ExportConfig, {**stored, **given}, "the export's options")


def check_overrides(config: ExportConfig, outputs: Outputs, flags: Mapping[str, Any]) -> None:
    """Say that types set by hand are those of GGUF. Errors: ConfigError for flags that no output takes."""
    given = {field: _FLAGS[field][0][0] for field in _BY_HAND if getattr(config, field)}
    if not given or not set(outputs.paths) - set(outputs.gguf.values()):
        return
    options = " and ".join(given.values())
    if not outputs.gguf and any(flags.get(field) for field in given):
        raise ConfigError(
            f"{options} can set the types of a GGUF file alone, and none is asked for",
            "Leave it out, or add --format gguf. Of ONNX, --block-size sets the blocks and --tune chooses them.",
        )
    others = ", ".join(sorted({path.name for path in outputs.paths} - {path.name for path in outputs.gguf.values()}))
    console.warn(f"{options} can set the types of GGUF files alone and changes nothing in {others}")


def check_used(outputs: Outputs, flags: Mapping[str, Any]) -> None:
    """Errors: ConfigError for a flag that no output has a use for; what a run's configuration says may wait."""
    for field, (what, how, there) in _ONLY_FOR.items():
        if flags.get(field) and not there(outputs):
            option = _FLAGS[field][0][0]
            raise ConfigError(f"{option} is for {what} alone, and none is asked for", f"Leave it out, or add {how}.")


def _value(field: str, value: Any) -> Any:
    if field in _LISTS:
        return list(dict.fromkeys(part.strip().lower() for part in value.split(",") if part.strip()))
    if field in _NUMBERS:
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def byte_count(text: str | None, option: str) -> int | None:
    """Bytes of a size such as 2G, 500MB or 1000000. Errors: ConfigError when it is none."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ConfigError(f"{option} {text!r} is not a size", "For instance 2G, 500M, or a number of bytes.")
    return size
