"""Which storage types go to which formats, for the check before training, for make's rules and for the export."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError
from edgetune_converters.names import FormatName

if TYPE_CHECKING:
    from edgetune.config import ExportConfig

_Types = Mapping[FormatName, tuple[str, ...]]


def types_by_format(config: ExportConfig, types_given: bool) -> dict[FormatName, list[str]]:
    """Return the storage types of `config` that each of its formats has; a format may have none of them.

    Args:
        config: Formats and storage types.
        types_given: Whether the user named these very types. Then every type needs a format that has it, and gguf and
            onnx need a type.

    Raises:
        ConfigError: No type is named, a type does not exist, or one of the needs above is not met.
    """
    from edgetune_converters.formats import FORMATS

    if not config.formats:  # a training without export
        return {}
    if not config.types:
        raise ConfigError("-q names no type, nor does export.types", "For instance -q q4_k_m, or -q q4_k_m,q8_0")
    known: _Types = {name: format_.types for name, format_ in FORMATS.items()}
    _refuse_unknown(config.types, tuple(dict.fromkeys(type_ for types in known.values() for type_ in types)))
    found = {format_: [type_ for type_ in config.types if type_ in known[format_]] for format_ in config.formats}
    if types_given:
        _refuse_types_without_a_format(config, found, known)
        _refuse_formats_without_a_type(config, found, known)
    return found


def are_given(config: ExportConfig) -> bool:
    """Whether a configuration names storage types; otherwise each format takes its default."""
    return "types" in config.model_fields_set


def _refuse_unknown(types: list[str], known: tuple[str, ...]) -> None:
    for type_ in types:
        if type_ in known:
            continue
        near = difflib.get_close_matches(type_, known, n=1, cutoff=0.6)
        meant = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{type_!r} is not a storage type that can be written{meant}", f"Known: {', '.join(known)}")


def _refuse_types_without_a_format(config: ExportConfig, found: Mapping[FormatName, list[str]], known: _Types) -> None:
    for type_ in config.types:
        if any(type_ in types for types in found.values()):
            continue
        home = "onnx" if type_ in known["onnx"] else "gguf"
        others = ", ".join(known[config.formats[0]])
        raise ConfigError(
            f"{type_} is a type of {home}, not of {' or '.join(config.formats)}",
            f"Add {home} to the formats, or give a type that they have: {others}",
        )


def _refuse_formats_without_a_type(config: ExportConfig, found: Mapping[FormatName, list[str]], known: _Types) -> None:
    formats: tuple[FormatName, ...] = ("gguf", "onnx")
    for format_ in formats:
        if format_ in found and not found[format_]:
            hint = f"Add one of {', '.join(known[format_])} to the types"
            raise ConfigError(f"{', '.join(config.types)}: none of them is a type of {format_}", hint)
