"""The receipt of an artifact: what it was made from and what it holds, as JSON beside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from edgetune_converters.errors import ArtifactError, CheckpointError
from edgetune_converters.files import atomic
from edgetune_converters.files.contents import read_json, sha256_of

SUFFIX = ".receipt.json"
VERSION = 2
"""Version 1, which has no `version` key, calls `type_search` "tuning"."""
_PACKAGES = ("edgetune", "llama-cpp-python", "numpy", "tokenizers")
_HINT = "Export the model again, or restore the file"


def receipt_path(artifact: Path) -> Path:
    """Return the path of the receipt of an artifact: model.gguf.receipt.json."""
    return artifact.with_name(artifact.name + SUFFIX)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The receipt of one exported artifact. Hashes are SHA-256 in hexadecimal, sizes are bytes."""

    version: int = VERSION
    artifact: str
    """Path of the artifact; in the file only its name."""
    sha256: str
    """Hash of the file, of the first part of a split GGUF, or of a directory (`combined_hash` of `files`)."""
    size: int
    format: str
    """Key of `formats.FORMATS`."""
    recipe: str
    """Recipe of a GGUF file, or the storage type of another format."""
    architecture: str
    """`general.architecture` of GGUF."""
    base: dict[str, str]
    """Hashes of the files of the base by name."""
    adapter: dict[str, str] | None
    """Hashes of the files of the adapter by name."""
    merge_base: str
    types: dict[str, int]
    """Bytes by storage type."""
    tensors: dict[str, str]
    """Storage type by tensor."""
    weights: int
    bits_per_weight: float
    fallback_share: float
    """Share of the bytes in other types than the recipe asks for."""
    tokenizer: dict[str, str]
    """`tokenizer.ggml.model` and `tokenizer.ggml.pre` of a GGUF file."""
    notes: list[str] = field(default_factory=list)
    survival: dict[str, float] | None = None
    """<Q(W+D)-Q(W), D>/|D|^2 by tensor: 1 where the adapter's change D came through quantization Q unharmed."""
    overrides: list[str] = field(default_factory=list)
    """Storage types set by hand, as given on the command line."""
    files: dict[str, str] = field(default_factory=dict)
    """Hashes by name of the files of a directory or of the parts of a split GGUF; empty for a single file."""
    imatrix: dict[str, str] | None = None
    """Name and hash of the importance matrix."""
    merge_base_kld: dict[str, float] | None = None
    """Mean divergence in nats from the trained model by merge base, where it decided the merge base."""
    combination: dict[str, Any] | None = None
    """How several adapters were combined: method, names, weights and hashes; None for one adapter."""
    type_search: dict[str, Any] | None = None
    """Measurements of `--search-types`, the chosen storage types and why."""
    exporter: str | None = None
    """Exporter that traced the graph; None where edgetune built it."""
    exporter_kld: float | None = None
    """Mean divergence in nats of the traced graph from transformers with the same weights."""
    lora_error: dict[str, float] | None = None
    """|D-BA|/|D| by tensor, where A and B of a GGUF adapter approximate a change D; None where all are exact."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote the artifact."""

    def write(self) -> Path:
        """Write the receipt beside its artifact atomically and return its path."""
        path = receipt_path(Path(self.artifact))
        stored = asdict(self) | {"artifact": Path(self.artifact).name}
        atomic.write_text(path, json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, artifact: Path) -> Self:
        """Read the receipt beside `artifact`.

        Raises:
            ArtifactError: The receipt is missing, is not a receipt, or has a newer version.
        """
        path = receipt_path(artifact)
        try:
            stored = read_json(path)
        except CheckpointError as error:
            raise ArtifactError(error.message, "A receipt is written beside each exported file") from error
        return cls.from_json(stored, path, artifact)

    @classmethod
    def read_if_present(cls, artifact: Path) -> Self | None:
        """Read the receipt beside `artifact`; None where there is none. Raises ArtifactError as `read`."""
        return cls.read(artifact) if receipt_path(artifact).is_file() else None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: Path, artifact: Path) -> Self:
        """Build the receipt of `artifact` from a JSON object read from `path`.

        Receipts of older versions are completed; keys that this version does not know are ignored.

        Raises:
            ArtifactError: The object is not a receipt, or has a newer version.
        """
        version = stored.get("version", 1)
        if type(version) is not int or version < 1:
            raise ArtifactError(f"{path} is not a receipt: its version is {version!r}", _HINT)
        if version > VERSION:
            raise ArtifactError(
                f"{path} is a receipt of version {version}; this edgetune reads versions up to {VERSION}",
                "Update edgetune",
            )
        renamed = {"type_search": stored["tuning"]} if version == 1 and "tuning" in stored else {}
        values = {**stored, **renamed, "version": VERSION, "artifact": str(artifact)}
        _check_fields(cls, values, path)
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})

    def check(self) -> None:
        """Compare the artifact's files with their hashes.

        Raises:
            ArtifactError: A file is missing, or is not the one that this receipt was written for.
        """
        artifact = Path(self.artifact)
        folder = artifact if artifact.is_dir() else artifact.parent
        for name, digest in (self.files or {artifact.name: self.sha256}).items():
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder / name}, which belongs to {artifact}, is missing")
            if sha256_of(folder / name) != digest:
                raise ArtifactError(f"{folder / name} is not the file of its receipt: its contents have changed")


def _check_fields(cls: type[Receipt], values: Mapping[str, Any], path: Path) -> None:
    required = {entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING}
    if missing := required - values.keys():
        raise ArtifactError(f"{path} is not a receipt: it lacks {', '.join(sorted(missing))}", _HINT)
    for name, hint in get_type_hints(cls).items():
        if name in values and not _conforms(values[name], hint):
            raise ArtifactError(f"{path} is not a receipt: {name!r} is {values[name]!r:.60}", _HINT)


def _conforms(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is NoneType:
        return hint is Any or value is None
    if origin is UnionType:
        return any(_conforms(value, one) for one in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_conforms(each, arguments[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_conforms(each, arguments[0]) for each in value)
    accepted = (int, float) if hint is float else hint
    return isinstance(value, accepted) and not isinstance(value, bool)


def combined_hash(files: Mapping[str, str]) -> str:
    """Return one hash for several files: SHA-256 of the lines "name hash", sorted by name."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that the bytes of an artifact may depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
