"""What an export writes and where: each format with the types that it can have, and the names of the files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import ExportConfig
from edgetune.errors import ConfigError
from edgetune.storage_types import GRAPHS, types_by_format

_BASE_TYPE = "base"
_GGUF = ("q4_k_m",)
_FOLDERS = ("safetensors", "onnx")


@dataclass(frozen=True)
class Outputs:
    """Type -> path, for each format."""

    gguf: dict[str, Path]
    safetensors: dict[str, Path]
    lora: dict[str, Path]
    onnx: dict[str, Path]

    @property
    def paths(self) -> list[Path]:
        """All of them."""
        return [path for kind in (self.gguf, self.safetensors, self.lora, self.onnx) for path in kind.values()]


NOTHING = Outputs({}, {}, {}, {})


def outputs_of(config: ExportConfig, name: str, folder: Path, output: Path | None, types_given: bool) -> Outputs:
    """The outputs of an export of the model `name`, in `folder` unless `output` says otherwise.

    Each type goes to every format that has it; `types_given` says that the user asked for these very types.
    """
    types = types_by_format(config, types_given)
    names = {
        "gguf": {type_: f"{name}-{type_}.gguf" for type_ in types.get("gguf") or _GGUF},
        "safetensors": {type_: f"{name}-{type_}" for type_ in types.get("safetensors", [])}
        or {_BASE_TYPE: f"{name}-merged"},
        "gguf-lora": {type_: f"{name}-lora-{type_}.gguf" for type_ in types.get("gguf-lora", [])}
        or {"f32": f"{name}-lora.gguf"},
        "onnx": {type_: f"{name}-{type_}-onnx" for type_ in types.get("onnx") or GRAPHS[:1]},
    }
    placed = {format_: names[format_] if format_ in config.formats else {} for format_ in names}
    single = _single(placed, output)
    if single is not None:
        format_, type_, path = single
        return Outputs(*({type_: path} if format_ == other else {} for other in names))
    where = output or folder
    return Outputs(*({type_: where / file for type_, file in files.items()} for files in placed.values()))


def _single(placed: dict[str, dict[str, str]], output: Path | None) -> tuple[str, str, Path] | None:
    """The one output of an export that names it whole: a .gguf file, or a directory for a format that is one."""
    wanted = [(format_, type_) for format_, types in placed.items() for type_ in types]
    if output is None:
        return None
    if output.suffix == ".gguf":
        if len(wanted) > 1:
            raise ConfigError(f"{len(wanted)} types cannot be written to one file {output}", "Give a folder with -o.")
        if wanted[0][0] in _FOLDERS:
            raise ConfigError(
                f"{output} is the name of a file; {wanted[0][0]} is a directory", "Give a folder with -o."
            )
        return *wanted[0], output
    return (*wanted[0], output) if len(wanted) == 1 and wanted[0][0] in _FOLDERS else None


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """An export that took an hour is not overwritten by a slip of the hand."""
    existing = [str(path) for output in paths for path in (output, *parts_of(output)) if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{', '.join(existing)} exists already", "Add --overwrite, or write elsewhere with -o.")


def refuse_foreign_cards(outputs: Outputs, card: bool, overwrite: bool) -> None:
    """A README.md that someone wrote is not replaced by a model card unless that is asked for."""
    if not card or overwrite:
        return
    from edgetune.publish import model_card

    folders = {path.parent for path in (*outputs.gguf.values(), *outputs.lora.values())}
    for path in (folder / model_card.FILE for folder in sorted(folders)):
        if path.exists() and not model_card.is_generated(path):
            raise ConfigError(f"{path} was not made by edgetune", "Add --overwrite, or write elsewhere with -o.")


def parts_of(path: Path) -> list[Path]:
    """The files of a split GGUF that lie there already."""
    if path.suffix != ".gguf":
        return []
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-?????-of-?????.gguf"))
