"""The receipt of an artifact: what went into it and what came out, as JSON beside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from edgetune_converters.errors import ArtifactError, CheckpointError
from edgetune_converters.files import atomic
from edgetune_converters.files.contents import read_json, sha256_of

SUFFIX = ".receipt.json"
_TOOLS = ("edgetune", "llama-cpp-python", "numpy", "tokenizers")


def receipt_path(artifact: Path) -> Path:
    """Where the receipt of an artifact lies: model.gguf.receipt.json."""
    return artifact.with_name(artifact.name + SUFFIX)


@dataclass
class Receipt:
    """One exported artifact. Everything in it is JSON; hashes are SHA-256 in hexadecimal.

    `base` and `adapter` map file names to hashes; `types` maps storage types to bytes and `tensors` each tensor to its
    type; `overrides` are types set by hand, as they were written. `survival` maps a tensor to
    <Q(W+D)-Q(W), D>/|D|^2, which is 1 where the adapter's change came through quantization whole. `files` maps names
    to hashes where the artifact is several files: a directory, or the parts of a split GGUF, of which `artifact` and
    `sha256` are the first. `merge_base_kld` is what decided about the merge base, where that was measured: the mean
    divergence (nats) from the trained model with each. `tuning` is what was measured to choose types, and what was
    chosen for which reason. `exporter` names whose graph it is where it is not our own, and `exporter_kld` is its mean
    divergence (nats) from transformers with the same weights.
    """

    artifact: str
    sha256: str
    size: int
    format: str
    recipe: str
    architecture: str
    base: dict[str, str]
    adapter: dict[str, str] | None
    merge_base: str
    types: dict[str, int]
    tensors: dict[str, str]
    weights: int
    bits_per_weight: float
    fallback_share: float
    tokenizer: dict[str, str]
    notes: list[str] = field(default_factory=list)
    survival: dict[str, float] | None = None
    overrides: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    imatrix: dict[str, str] | None = None
    merge_base_kld: dict[str, float] | None = None
    tuning: dict[str, Any] | None = None
    exporter: str | None = None
    exporter_kld: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def write(self) -> Path:
        """Write the receipt beside its artifact, whole or not at all, and return its path."""
        path = receipt_path(Path(self.artifact))
        stored = asdict(self) | {"artifact": Path(self.artifact).name}
        atomic.write_text(path, json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, artifact: Path) -> Self:
        """The receipt beside `artifact`. Errors: ArtifactError when it is missing or not a receipt."""
        path = receipt_path(artifact)
        try:
            stored = read_json(path)
        except CheckpointError as error:
            raise ArtifactError(error.message, "A receipt is written beside each exported file") from error
        known = {entry.name for entry in fields(cls)}
        optional = {entry.name for entry in fields(cls) if (entry.default, entry.default_factory) != (MISSING, MISSING)}
        if missing := known - stored.keys() - optional:
            raise ArtifactError(f"{path} is not a receipt: it lacks {', '.join(sorted(missing))}")
        return cls(**{name: value for name, value in stored.items() if name in known} | {"artifact": str(artifact)})

    def check(self) -> None:
        """Errors: ArtifactError when the file is not the one that this receipt was written for."""
        artifact = Path(self.artifact)
        folder = artifact if artifact.is_dir() else artifact.parent
        for name, digest in (self.files or {artifact.name: self.sha256}).items():
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder / name}, which belongs to {artifact}, is missing")
            if sha256_of(folder / name) != digest:
                raise ArtifactError(f"{folder / name} is not the file of its receipt: its contents have changed")


def combined_hash(files: Mapping[str, str]) -> str:
    """One hash for several files: SHA-256 of the lines "name hash" in the order of names."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions of what the bytes of an artifact may depend on."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
