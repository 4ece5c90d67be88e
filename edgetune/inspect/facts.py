"""Facts about a file or a run, ready for JSON: section -> name -> value. What the readers of all formats share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edgetune.errors import RunDirectoryError
from edgetune.validation.results import ValidationResults, results_path
from edgetune_converters.provenance.receipts import Receipt, receipt_path

Facts = dict[str, Any]
Source = TypeVar("Source")
LARGEST = 5
"""Number of tensors that are listed if not all are."""


class StoredTensor(NamedTuple):
    """A tensor of a file."""

    name: str
    type: str
    shape: Sequence[int]
    """In NumPy's order."""
    bytes: int


def read_sections(source: Source, sections: Mapping[str, Callable[[Source], Facts]]) -> Facts:
    """Read each section of the table from an open file or run."""
    return {name: read(source) for name, read in sections.items()}


def neighbor_facts(artifact: Path) -> Facts:
    """Return the sections that come from the files beside an artifact: its receipt and its validation."""
    return {"receipt": receipt_facts(artifact), "validation": validation_facts(artifact)}


def bits_per_weight(stored_bytes: int, weights: int) -> float | None:
    """Return the bits that a weight takes in the file, scales included."""
    return round(8 * stored_bytes / weights, 3) if weights else None


def type_mix(tensors: Iterable[StoredTensor]) -> Facts:
    """Return storage type -> number of tensors, bytes and share of the bytes, the largest first."""
    mix: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        entry = mix.setdefault(tensor.type, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    total = sum(entry["bytes"] for entry in mix.values()) or 1
    for entry in mix.values():
        entry["share"] = round(entry["bytes"] / total, 4)
    return dict(sorted(mix.items(), key=lambda item: -item[1]["bytes"]))


def tensor_facts(tensors: Sequence[StoredTensor], *, all_tensors: bool) -> Facts:
    """Return the section that lists all tensors, or the largest ones: name -> type, shape, bytes."""
    title = "tensors" if all_tensors else "largest tensors"
    shown = tensors if all_tensors else sorted(tensors, key=lambda tensor: -tensor.bytes)[:LARGEST]
    return {title: {name: {"type": type_, "shape": list(shape), "bytes": size} for name, type_, shape, size in shown}}


def template_facts(source: str | None) -> Facts:
    """Return the first line and the hash of a chat template."""
    if source is None:
        return {"chat template": None}
    return {
        "chat template": source.strip().split("\n")[0][:100],
        "chat template sha256": hashlib.sha256(source.encode()).hexdigest(),
    }


def receipt_facts(artifact: Path) -> Facts:
    """Return what only the receipt beside an artifact holds; {} without a receipt."""
    if not receipt_path(artifact).is_file():
        return {}
    receipt = Receipt.read(artifact)
    survival = receipt.survival or {}
    lowest = min(survival, key=lambda name: survival[name]) if survival else None
    return {
        "path": str(receipt_path(artifact)),
        "recipe": receipt.recipe,
        "merge base": receipt.merge_base,
        "mean KLD with each merge base": receipt.merge_base_kld,
        "in another type than asked for": receipt.fallback_share,
        "lowest delta survival": f"{survival[lowest]:.4f} {lowest}" if lowest else None,
        "notes": receipt.notes,
        "versions": receipt.versions,
    }


def validation_facts(artifact: Path) -> Facts:
    """Return the headline of the validation beside an artifact; {} without one, or for a damaged or newer one."""
    try:
        results = ValidationResults.read(results_path(artifact))
    except RunDirectoryError:
        return {}
    rung = next((each for each in results.files if each.file == artifact.name), None)
    if rung is None:
        return {}
    return {
        "passed": results.passed,
        "thresholds set": sum(limit is not None for limit in results.gate.values()),
        "mean KLD": rung.figures.kld.value,
        "same top": rung.figures.same_top.value,
        "recovery": rung.figures.recovery,
        "task": rung.task.share if rung.task else None,
    }
