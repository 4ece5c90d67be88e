"""Metadata that do not depend on storage types: name and size of the model, provenance, hyperparameters."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from edgetune_converters.adapters.combined import CombinedAdapter
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Scalar, Value, string, value_of
from edgetune_converters.model import Model
from edgetune_converters.provenance.receipts import combined_hash, tool_versions
from edgetune_converters.provenance.size_label import size_label

_JOINERS = "\u200c\u200d"
# controls, formats, half code points, private ones, and separators of lines and paragraphs
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def general_keys(model: Model, name: str | None) -> dict[str, Value]:
    """Return the keys that begin every GGUF file; readers expect the architecture early."""
    return {
        "general.architecture": string(model.family.gguf),
        "general.type": string("model"),
        "general.name": string(_title(model, name)),
    }


def size_keys(model: Model, name: str | None) -> dict[str, Value]:
    """Return the size label, such as 1.2B."""
    shapes = [(tensor.gguf_name, tensor.shape) for tensor in model.tensors]
    return {"general.size_label": string(size_label(_title(model, name), shapes))}


def _title(model: Model, name: str | None) -> str:
    return visible(str(name or model.config.get("_name_or_path") or model.checkpoint.path.resolve().name))


def visible(name: str) -> str:
    """Return a name without code points that show nothing or reorder text: readers and auditors take them for a trick.

    The joiners of Persian and Indic scripts and of emoji stay.
    """
    return "".join(each for each in name if each in _JOINERS or unicodedata.category(each) not in _HIDDEN)


def provenance_keys(model: Model, base_hash: str, adapter: Mapping[str, str] | None) -> dict[str, str]:
    """Return the keys for the inputs of the export; `adapter` maps the files of the adapter to their hashes."""
    found = {
        keys.VERSION: tool_versions()["edgetune"],
        keys.MERGE_BASE: model.merge_base.name,
        keys.BASE_HASH: base_hash,
    }
    if adapter is None:
        return found
    found[keys.ADAPTER_HASH] = combined_hash(adapter)
    combined = combination_record(model, adapter)
    return found if combined is None else found | {keys.COMBINATION: json.dumps(combined)}


def combination_record(model: Model, files: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Return how several adapters were combined, with the hash of each; None for one adapter.

    `files` maps the files of all adapters to their hashes.
    """
    if not isinstance(model.adapter, CombinedAdapter) or files is None:
        return None
    stated = model.adapter.description
    for each in stated["adapters"]:
        start = f"{each['name']}/"
        own = {name.removeprefix(start): digest for name, digest in files.items() if name.startswith(start)}
        each["sha256"] = combined_hash(own)
    return stated


def hyperparameter_keys(model: Model) -> dict[str, Value]:
    """Return sizes, norms and RoPE, as the table of the family gives them."""
    found = {key: value for key, make in model.family.metadata if (value := make(model.config)) is not None}
    return {f"{model.family.gguf}.{key}": value for key, value in found.items()}


def plain_keys(extra: Mapping[str, Scalar]) -> dict[str, Value]:
    """Return GGUF values for Python scalars."""
    return {key: value_of(value) for key, value in extra.items()}
