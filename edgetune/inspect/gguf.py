"""Facts about a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune.inspect.facts import (
    Facts,
    StoredTensor,
    bits_per_weight,
    neighbor_facts,
    read_sections,
    template_facts,
    tensor_facts,
    type_mix,
)
from edgetune_converters.gguf import keys, reader
from edgetune_converters.gguf.reader import GgufFile

SPECIAL = ("bos", "eos", "eot", "eom", "padding", "unknown")
"""Roles of special tokens in the metadata."""


def describe(path: Path, all_tensors: bool = False) -> Facts:
    """Return section -> fact -> value. Raises ArtifactError if the path is no complete GGUF file."""
    file = reader.read(path)
    return {
        **read_sections(file, _SECTIONS),
        **neighbor_facts(path),
        **tensor_facts(_tensors(file), all_tensors=all_tensors),
    }


def _tensors(file: GgufFile) -> list[StoredTensor]:
    return [StoredTensor(tensor.name, tensor.type, tensor.shape, tensor.bytes) for tensor in file.tensors]


def _file_facts(file: GgufFile) -> Facts:
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
    return {
        "path": str(file.path),
        "bytes": file.size,
        "gguf version": file.version,
        "parameters": weights,
        "bits per weight": bits_per_weight(sum(tensor.bytes for tensor in file.tensors), weights),
        "tensors": len(file.tensors),
    }


def _model_facts(file: GgufFile) -> Facts:
    """Return name, architecture, and every scalar key of the architecture."""
    architecture = file.metadata.get("general.architecture")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.") and not isinstance(value, list)
    }
    return {"name": file.metadata.get("general.name"), "architecture": architecture, **own}


def _tokenizer_facts(file: GgufFile) -> Facts:
    """Return kind, size, special tokens and chat template."""
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    texts: list[Any] = tokens if isinstance(tokens, list) else []
    facts: Facts = {
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
    return facts | template_facts(template if isinstance(template, str) else None)


def _origin_facts(file: GgufFile) -> Facts:
    return {key: value for key, value in file.metadata.items() if key.startswith(keys.PREFIX)}


_SECTIONS: Mapping[str, Callable[[GgufFile], Facts]] = {
    "file": _file_facts,
    "model": _model_facts,
    "types": lambda file: type_mix(_tensors(file)),
    "tokenizer": _tokenizer_facts,
    "made from": _origin_facts,
}
