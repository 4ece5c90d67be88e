"""Which of the files that lie in a folder of exports are models that can be run, and what the others are.

A shell's `artifacts/*` names receipts, reports, Modelfiles and cards as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgetune.runtime.onnx.folder import is_onnx
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import reader

_MAGIC = b"GGUF"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_BESIDE = {
    ".receipt.json": "receipts", ".validation.json": "reports", ".junit.xml": "reports", ".html": "pages",
    ".modelfile": "Modelfiles", ".md": "model cards", ".parts": "lists of parts", ".partial": "unfinished files",
}  # fmt: skip
_OTHER = "other files"


def models_among(paths: Sequence[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """(models, what is none by its kind), in the order given.

    A path that does not exist, and whatever might be a damaged model, stays among the models: opening it says why not.
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
    """What this is if it is no model that can be run."""
    if not path.exists() or is_onnx(path):
        return None
    if path.is_dir():
        return "merged safetensors directories" if any(path.glob("*.safetensors")) else None
    if path.suffix != ".gguf" and not _begins_as_gguf(path):
        return next((kind for end, kind in _BESIDE.items() if path.name.lower().endswith(end)), _OTHER)
    if _LATER_PART.search(path.name):
        return "later parts of a split file"
    return "adapters" if is_adapter(path) else None


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def is_adapter(path: Path) -> bool:
    """Whether a file is a GGUF file with an adapter alone; False for a damaged one."""
    try:
        return reader.read(path).metadata.get("general.type") == "adapter"
    except ArtifactError:
        return False
