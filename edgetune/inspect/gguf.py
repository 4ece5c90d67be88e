"""What is in an exported file or a run directory, as plain facts: section -> name -> value, ready for JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.reference import store
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.artifacts import is_model
from edgetune.validation.results import json_path
from edgetune_converters.gguf import keys, reader
from edgetune_converters.gguf.reader import GgufFile, TensorEntry
from edgetune_converters.provenance.receipts import Receipt, receipt_path

LARGEST = 5
SPECIAL = ("bos", "eos", "eot", "eom", "padding", "unknown")


# -- a file ------------------------------------------------------------------------------------------------------------


def describe_file(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Section -> fact -> value. Raises ArtifactError for what is not a whole GGUF file."""
    file = reader.read(path)
    sections = {
        "file": file_facts(file),
        "model": model_facts(file),
        "types": type_mix(file),
        "tokenizer": tokenizer_facts(file.metadata),
        "made from": {key: value for key, value in file.metadata.items() if key.startswith(keys.PREFIX)},
        "receipt": receipt_facts(path),
        "validation": validation_facts(path),
    }
    if tensors:
        return {**sections, "tensors": tensor_facts(file.tensors)}
    largest = sorted(file.tensors, key=lambda tensor: tensor.bytes, reverse=True)[:LARGEST]
    return {**sections, "largest tensors": tensor_facts(largest)}


def file_facts(file: GgufFile) -> dict[str, Any]:
    """Size, parameters, and the bits that a weight really takes."""
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
    stored = sum(tensor.bytes for tensor in file.tensors)
    return {
        "path": str(file.path),
        "bytes": file.size,
        "gguf version": file.version,
        "parameters": weights,
        "bits per weight": round(8 * stored / weights, 3) if weights else None,
        "tensors": len(file.tensors),
    }


def model_facts(file: GgufFile) -> dict[str, Any]:
    """What the architecture says of itself: every scalar key under its name."""
    architecture = file.metadata.get("general.architecture")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.") and not isinstance(value, list)
    }
    return {"name": file.metadata.get("general.name"), "architecture": architecture, **own}


def type_mix(file: GgufFile) -> dict[str, Any]:
    """Storage type -> tensors, bytes and share of the bytes, the largest first."""
    total = sum(tensor.bytes for tensor in file.tensors) or 1
    mix: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors:
        entry = mix.setdefault(tensor.type, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    for entry in mix.values():
        entry["share"] = round(entry["bytes"] / total, 4)
    return dict(sorted(mix.items(), key=lambda item: -item[1]["bytes"]))


def tokenizer_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, size, special tokens, and which chat template: its hash and its first line."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    texts: list[str] = tokens if isinstance(tokens, list) else []
    facts: dict[str, Any] = {
        "kind": metadata.get("tokenizer.ggml.model"),
        "pre-tokenizer": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(texts),
        "adds BOS": metadata.get("tokenizer.ggml.add_bos_token"),
    }
    for role in SPECIAL:
        id_ = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(id_, int):
            facts[role] = f"{id_} {texts[id_]!r}" if id_ < len(texts) else f"{id_} (outside the vocabulary)"
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        facts["chat template"] = template.strip().split("\n")[0][:100]
        facts["chat template sha256"] = hashlib.sha256(template.encode()).hexdigest()
    else:
        facts["chat template"] = None
    return facts


def tensor_facts(tensors: list[TensorEntry]) -> dict[str, Any]:
    """Name -> type, shape (as numpy has it), bytes."""
    return {
        tensor.name: {"type": tensor.type, "shape": list(tensor.shape), "bytes": tensor.bytes} for tensor in tensors
    }


def receipt_facts(path: Path) -> dict[str, Any]:
    """The receipt beside the file, without what the file itself says."""
    if not receipt_path(path).is_file():
        return {}
    receipt = Receipt.read(path)
    survival = receipt.survival or {}
    lowest = min(survival, key=lambda name: survival[name]) if survival else None
    return {
        "path": str(receipt_path(path)),
        "recipe": receipt.recipe,
        "merge base": receipt.merge_base,
        "mean KLD with each merge base": receipt.merge_base_kld,
        "in another type than asked for": receipt.fallback_share,
        "lowest delta survival": f"{survival[lowest]:.4f} {lowest}" if lowest else None,
        "notes": receipt.notes,
        "versions": receipt.versions,
    }


def validation_facts(path: Path) -> dict[str, Any]:
    """The headline of the report beside the file."""
    return headline(json_path(path), path.name)


def headline(report: Path, name: str) -> dict[str, Any]:
    """Passed or not, and the figures, of the file called `name`; empty without a report."""
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        rung = next(rung for rung in content["rungs"] if rung["file"] == name)
        figures = rung["figures"]
        return {
            "passed": content["passed"],
            "mean KLD": figures["kld"]["value"],
            "same top": figures["same_top"]["value"],
            "recovery": figures["recovery"],
            "task": rung["task"]["share"] if rung["task"] else None,
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration):  # none, or of another version
        return {}


# -- a run -------------------------------------------------------------------------------------------------------------


def describe_run(run: RunDirectory) -> dict[str, Any]:
    """Section -> fact -> value, from run.json and what lies beside it."""
    manifest = run.manifest
    config = manifest.config
    base = manifest.base.model_dump(mode="json", exclude_unset=True)
    stages = manifest.stages.model_dump(mode="json", exclude_unset=True)
    return {
        "run": {"path": str(run.path), "name": config.get("name")},
        "base": {**base, "files": f"{len(base.get('files', {}))} files, hashed"},
        "data": {name: source_facts(sources) for name, sources in manifest.data.items()},
        "adapter": config.get("adapter", {}),
        "quantization": config.get("quantization", {}),
        "training": config.get("training", {}),
        **{f"stage: {name}": stage for name, stage in {**stages, **captured(run)}.items()},
        "gate": {key: limit for key, limit in config.get("gate", {}).items() if limit is not None},
        "device": manifest.device,
        "versions": manifest.versions,
        "artifacts": artifact_facts(run),
    }


def captured(run: RunDirectory) -> dict[str, Any]:
    """The stage that wrote the reference; empty where that is missing or damaged."""
    try:
        return {"reference": store.summary(run)}
    except RunDirectoryError:
        return {}


def source_facts(sources: Any) -> Any:
    """Where rows came from: `train.jsonl (2400 rows)`; what is not a list of sources stays as it is."""
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
        return sources
    return ", ".join(f"{source.get('path') or source.get('name')} ({source.get('rows')} rows)" for source in sources)


def artifact_facts(run: RunDirectory) -> dict[str, Any]:
    """File -> bytes, and the headline of its report."""
    return {
        path.name: {"bytes": size_on_disk(path), **validation_facts(path)}
        for path in sorted(run.artifacts.glob("*"))
        if is_model(path)
    }


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
