"""Which artifacts an export writes, and where: each format with its storage types and the names of the files."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError
from edgetune.storage_types import types_by_format
from edgetune_converters.names import FormatName

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.request import Target

_NAMES: Mapping[FormatName, str] = {
    "gguf": "{name}-{type}.gguf",
    "safetensors": "{name}-{type}",
    "gguf-lora": "{name}-lora-{type}.gguf",
    "onnx": "{name}-{type}-onnx",
}
_NAMES_WITHOUT_A_TYPE: Mapping[FormatName, str] = {"safetensors": "{name}-merged", "gguf-lora": "{name}-lora.gguf"}
"""Where no storage type of the format is named."""


def targets_of(
    config: ExportConfig, name: str, folder: Path, output: Path | None, types_given: bool
) -> tuple[Target, ...]:
    """Return the targets of an export, by format in the order of FORMATS.

    Args:
        config: Formats and storage types. Each type goes to every format that has it.
        name: Name of the model.
        folder: Where the artifacts go without `output`.
        output: The one artifact, or the folder for several.
        types_given: Whether the user named these very types, so that one without a format is an error.

    Raises:
        ConfigError: Types and formats, or types and `output`, do not go together.
    """
    from edgetune_converters.formats import FORMATS
    from edgetune_converters.request import Target

    if not config.formats:
        raise ConfigError("export.formats is empty: there is nothing to export", "Name a format, such as --format gguf")
    types = types_by_format(config, types_given)
    found = []
    for format_ in (each for each in FORMATS if each in config.formats):
        names = dict.fromkeys(types[format_], _NAMES[format_])
        default = _NAMES_WITHOUT_A_TYPE.get(format_, _NAMES[format_])
        for type_, pattern in (names or {FORMATS[format_].default_type: default}).items():
            found.append(Target(format_, type_, (output or folder) / pattern.format(name=name, type=type_)))
    if output is not None and _is_single(found, output):
        return (Target(found[0].format, found[0].type, output),)
    return tuple(found)


def _is_single(targets: Sequence[Target], output: Path) -> bool:
    """Whether `output` is the artifact itself: a .gguf file, or the directory of one that is a directory."""
    from edgetune_converters.formats import FORMATS

    first = targets[0]
    if output.suffix == ".gguf":
        if len(targets) > 1:
            raise ConfigError(f"{len(targets)} types cannot be written to one file {output}", "Give a folder with -o")
        if FORMATS[first.format].is_directory:
            raise ConfigError(f"{output} is the name of a file; {first.format} is a directory", "Give a folder with -o")
        return True
    return len(targets) == 1 and FORMATS[first.format].is_directory


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise ConfigError if an artifact, or a part of a split GGUF, exists already."""
    existing = [str(path) for output in paths for path in (output, *_parts(output)) if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{', '.join(existing)} exists already", "Add --overwrite, or write elsewhere with -o")


def refuse_foreign_cards(targets: Iterable[Target], card: bool, overwrite: bool) -> None:
    """Raise ConfigError if a model card would replace a README.md that edgetune did not write."""
    if not card or overwrite:
        return
    from edgetune.publish import model_card

    folders = {target.path.parent for target in targets if target.format in ("gguf", "gguf-lora")}
    for path in (folder / model_card.FILE for folder in sorted(folders)):
        if path.exists() and not model_card.is_generated(path):
            raise ConfigError(f"{path} was not made by edgetune", "Add --overwrite, or write elsewhere with -o")


def _parts(path: Path) -> list[Path]:
    """Return the existing files of a split GGUF."""
    if path.suffix != ".gguf":
        return []
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-?????-of-?????.gguf"))
