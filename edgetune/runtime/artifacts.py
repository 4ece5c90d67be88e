"""Tell exported models from the other files of their folder, which a shell's `artifacts/*` names as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgetune.runtime.onnx.folder import is_onnx
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import keys, reader

_MAGIC = b"GGUF"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_KINDS = {
    ".receipt.json": "receipts", ".validation.json": "reports", ".junit.xml": "reports", ".html": "pages",
    ".modelfile": "Modelfiles", ".md": "model cards", ".parts": "lists of parts", ".partial": "unfinished files",
}  # fmt: skip
_OTHER = "other files"


def artifact_format(path: Path) -> str | None:
    """Return the format in which `path` is opened, "gguf" or "onnx"; None for a directory without a graph.

    Any other file counts as GGUF: its reader reports what is wrong with it.
    """
    if is_onnx(path):
        return "onnx"
    return None if path.is_dir() else "gguf"


def is_model(path: Path) -> bool:
    """Whether a path is a .gguf file, an .onnx file or a folder with a graph, by its name."""
    return path.suffix == ".gguf" or is_onnx(path)


def select_models(paths: Sequence[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return (models, other files by their kind), each in the given order.

    A path that does not exist and a file that may be a damaged model count as models: opening them gives the error.
    """
    models: list[Path] = []
    others: dict[str, list[Path]] = {}
    for path in paths:
        kind = _other_kind(path)
        if kind is None:
            models.append(path)
        else:
            others.setdefault(kind, []).append(path)
    return models, others


def _other_kind(path: Path) -> str | None:
    """Return the kind of a path that is not a model; None for a model."""
    if not path.exists() or is_onnx(path):
        return None
    if path.is_dir():
        return "merged safetensors directories" if any(path.glob("*.safetensors")) else None
    if path.suffix != ".gguf" and not _has_magic(path):
        return next((kind for end, kind in _KINDS.items() if path.name.lower().endswith(end)), _OTHER)
    if _LATER_PART.search(path.name):
        return "later parts of a split file"
    return "adapters" if is_adapter(path) else None


def _has_magic(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def has_score_head(path: Path) -> bool:
    """Whether a GGUF file is a reward model, by its header; False for a damaged file."""
    try:
        return keys.SCORE_HEAD in reader.read(path).metadata
    except ArtifactError:
        return False


def is_adapter(path: Path) -> bool:
    """Whether a file is a GGUF adapter without its base; False for a damaged file."""
    try:
        return reader.read(path).metadata.get("general.type") == "adapter"
    except ArtifactError:
        return False
