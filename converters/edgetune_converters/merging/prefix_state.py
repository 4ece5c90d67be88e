"""Prefix tuning beside a model: a safetensors file with the keys and values that come before those of every text.

The file holds `prefix.LAYER.key` and `prefix.LAYER.value`, each f32 [heads, n, head_dim], for positions 0 to n - 1; a
text begins at position n. Keys are put into the cache as they are, without a norm or a rotation. Their numbers are in
the order of the model's own keys: that of the GGUF file beside which the file lies, or that of Hugging Face.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgetune_converters.adapters.soft_prompt import PrefixAdapter
from edgetune_converters.architectures import BoundTensor, Family, ModelConfig
from edgetune_converters.architectures.operations import RopePermute
from edgetune_converters.errors import AdapterError
from edgetune_converters.tensors import F32

SUFFIX = ".prefix.safetensors"
IN_FOLDER = "prefix.safetensors"
FORMATS = ("gguf", "onnx")
"""The formats beside which a prefix can lie."""
_WINDOW = "attention.sliding_window"
_KEYS = ("attention_k", "attention_qkv")  # slots of the weights that make the keys
_WITHOUT_PLAIN_CACHE = ("kv_lora_rank", "conv_L_cache")  # fields of config.json


def path_beside(artifact: Path) -> Path:
    """Return the path of the prefix of an exported file or folder."""
    return artifact / IN_FOLDER if artifact.suffix != ".gguf" else artifact.with_name(artifact.stem + SUFFIX)


def why_not_beside(format_: str, family: Family, config: ModelConfig) -> str | None:
    """Return why a prefix cannot lie beside a model of a format; None if it can."""
    if format_ not in FORMATS:
        return f"{format_} has no place for a prefix of keys and values"
    stated = {key: value.data for key, make in family.metadata if (value := make(config)) is not None}
    if format_ == "gguf" and stated.get(_WINDOW):
        return f"llama.cpp keeps the keys and values of {family.name} in two caches, one for windows of attention"
    return None


def check_fits(adapter: PrefixAdapter, family: Family, config: ModelConfig) -> None:
    """Raise AdapterError unless the keys and values are those of this base."""
    own = (config.layers, 2, config.kv_heads, adapter.count, config.head_dim)
    if any(config.get(name) is not None for name in _WITHOUT_PLAIN_CACHE):
        raise AdapterError(
            f"{family.name} keeps no plain keys and values, which a prefix consists of", "Use another method"
        )
    if adapter.states.shape != own:
        layers, _, heads, _, size = adapter.states.shape
        raise AdapterError(
            f"the prefix {adapter.path} is for {layers} layers with {heads} heads of {size}, the base has {own[0]} "
            f"layers with {own[2]} heads of {own[4]}",
            "Was it trained on this base model?",
        )


def content(adapter: PrefixAdapter, bound: Sequence[BoundTensor], format_: str) -> bytes:
    """Return the file of a prefix beside a model of a format, "gguf" or "onnx"."""
    tensors: dict[str, F32] = {}
    for layer, (keys, values) in enumerate(adapter.states):
        own = _in_gguf_order(keys, bound, layer) if format_ == "gguf" else keys
        tensors |= {f"prefix.{layer}.key": own, f"prefix.{layer}.value": values}
    described: dict[str, object] = {"__metadata__": {"format": "edgetune-prefix-1", "tokens": str(adapter.count)}}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        described[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data = b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in tensors.values())
    return len(header).to_bytes(8, "little") + header + data


def _in_gguf_order(keys: F32, bound: Sequence[BoundTensor], layer: int) -> F32:
    """The keys [heads, n, head_dim] in the order in which the weights of a GGUF file make them."""
    made_by = next(item for item in bound if item.layer == layer and item.slot in _KEYS and item.part == "weight")
    heads, count, size = keys.shape
    numbers = np.arange(heads * size)
    for step in reversed(made_by.pieces[0].view.steps):
        if isinstance(step, RopePermute):
            numbers = step.source(numbers)
    flat = keys.transpose(1, 0, 2).reshape(count, heads * size)[:, numbers]
    ordered: F32 = np.ascontiguousarray(flat.reshape(count, heads, size).transpose(1, 0, 2))
    return ordered
