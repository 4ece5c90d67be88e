"""Which storage types go to which formats: decided here for the check before training, make's rules and the export."""

from __future__ import annotations

import difflib

from edgetune.config import ExportConfig
from edgetune.errors import ConfigError

FLOATS = ("f32", "f16", "bf16")
"""The types of a safetensors directory and of an adapter."""
GRAPHS = ("int4", "int8", "f16", "f32")
"""The types of ONNX."""
_TYPES = {"safetensors": FLOATS, "gguf-lora": FLOATS, "onnx": GRAPHS}


def types_by_format(config: ExportConfig, types_given: bool) -> dict[str, list[str]]:
    """The types that each format of `config` has, of those that are named; a format may have none of them.

    Errors: ConfigError for no type at all, for one that does not exist and, with `types_given` (the user named these
    very types), for one that none of the formats has and for a file format that has none of the types.
    """
    if not config.types:
        raise ConfigError("-q names no type, nor does export.types", "For instance -q q4_k_m, or -q q4_k_m,q8_0")
    known: dict[str, tuple[str, ...]] = {"gguf": _files(), **_TYPES}
    _refuse_unknown(config.types, tuple(dict.fromkeys(type_ for types in known.values() for type_ in types)))
    placed: dict[str, list[str]] = {
        format_: [type_ for type_ in config.types if type_ in known[format_]] for format_ in config.formats
    }
    if types_given:
        _refuse_homeless(config, placed, known)
        _refuse_empty(config, placed, known)
    return placed


def are_given(config: ExportConfig) -> bool:
    """Whether a configuration names its types, or leaves each format its own."""
    return "types" in config.model_fields_set


def _files() -> tuple[str, ...]:
    from edgetune_converters.quantization.recipes import ALIASES, RECIPES

    return (*RECIPES, *ALIASES)


def _refuse_unknown(types: list[str], known: tuple[str, ...]) -> None:
    for type_ in types:
        if type_ in known:
            continue
        near = difflib.get_close_matches(type_, known, n=1, cutoff=0.6)
        meant = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{type_!r} is not a storage type that can be written{meant}", f"Known: {', '.join(known)}")


def _refuse_homeless(config: ExportConfig, placed: dict[str, list[str]], known: dict[str, tuple[str, ...]]) -> None:
    for type_ in config.types:
        if any(type_ in types for types in placed.values()):
            continue
        home = "onnx" if type_ in GRAPHS else "gguf"
        others = ", ".join(known[config.formats[0]])
        raise ConfigError(
            f"{type_} is a type of {home}, not of {' or '.join(config.formats)}",
            f"Add {home} to the formats, or give a type that they have: {others}",
        )


def _refuse_empty(config: ExportConfig, placed: dict[str, list[str]], known: dict[str, tuple[str, ...]]) -> None:
    for format_ in ("gguf", "onnx"):
        if format_ in placed and not placed[format_]:
            hint = f"Add one of {', '.join(known[format_])} to the types."
            raise ConfigError(f"{', '.join(config.types)}: none of them is a type of {format_}", hint)
