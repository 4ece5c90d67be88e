"""What is in an ONNX folder, as plain facts; the counterpart of `inspection` for GGUF files."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from edgetune.inspect.gguf import LARGEST, receipt_facts, validation_facts
from edgetune.runtime.onnx import model_file
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.model_file import GraphFile, Initializer
from edgetune_converters.gguf import keys

# operators with weights in codes -> which inputs are codes, scales and zero points
_CODED = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
_MOE = {"QMoE": tuple(range(2, 14))}
_TABLES = {("com.microsoft", "GroupQueryAttention"): (7, 8), ("com.microsoft", "RotaryEmbedding"): (2, 3),
           ("", "RotaryEmbedding"): (1, 2)}  # fmt: skip
_USUAL_BITS, _USUAL_BLOCK = 4, 128  # attributes that a node leaves out


def describe_folder(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Section -> fact -> value. Raises ArtifactError for what is not a whole ONNX folder."""
    folder = OnnxFolder.open(path)
    model = model_file.read(folder.graph)
    artifact = folder.directory
    return {
        "file": file_facts(folder, model),
        "model": model_facts(folder, model),
        "types": type_mix(model),
        "operators": operator_facts(model),
        "tokenizer": tokenizer_facts(folder),
        "made from": made_from(model),
        "receipt": receipt_facts(artifact),
        "validation": validation_facts(artifact),
        **({"tensors": tensor_facts(model)} if tensors else {"largest tensors": tensor_facts(model, LARGEST)}),
    }


def file_facts(folder: OnnxFolder, model: GraphFile) -> dict[str, Any]:
    """Size, parameters, and the bits that a weight really takes."""
    weights, stored = parameters(model), sum(tensor.bytes for tensor in _weights(model))
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.proto.opset_import}
    return {
        "path": str(folder.path),
        "bytes": model.size,
        "onnx operator sets": ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
        "parameters": weights,
        "bits per weight": round(8 * stored / weights, 3) if weights else None,
        "tensors": len(model.tensors),
        "data": ", ".join(file.name for file in model.data_files) or "inside the graph",
    }


def model_facts(folder: OnnxFolder, model: GraphFile) -> dict[str, Any]:
    """What genai_config.json says of the model, under its own names."""
    scalars = {key: value for key, value in folder.genai.items() if not isinstance(value, (dict, list))}
    decoder = {key: value for key, value in folder.decoder.items() if isinstance(value, int)}
    return {"producer": f"{model.proto.producer_name} {model.proto.producer_version}".strip(), **scalars, **decoder}


def operator_facts(model: GraphFile) -> dict[str, int]:
    """Operator -> how many, the most frequent first."""
    counts = Counter(f"{node.domain or 'ai.onnx'}.{node.op_type}" for node in model.nodes)
    return dict(counts.most_common())


def type_mix(model: GraphFile) -> dict[str, Any]:
    """Storage type -> tensors, bytes and share of the bytes, the largest first; codes with their scales."""
    labels, total = _labels(model), sum(tensor.bytes for tensor in _stored(model)) or 1
    mix: dict[str, dict[str, Any]] = {}
    for tensor in _stored(model):
        entry = mix.setdefault(labels.get(tensor.name, tensor.dtype.lower()), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    for entry in mix.values():
        entry["share"] = round(entry["bytes"] / total, 4)
    return dict(sorted(mix.items(), key=lambda item: -item[1]["bytes"]))


def parameters(model: GraphFile) -> int:
    """Weights of the model: codes by their bits, scales and zero points not at all, nor whole numbers and tables."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in model.tensors}
    counts |= dict.fromkeys(_labels(model), 0) | dict(_codes(model))
    return sum(counts[tensor.name] for tensor in _weights(model))


def _weights(model: GraphFile) -> list[Initializer]:
    """Floats, and codes with what belongs to them; neither tables nor whole numbers."""
    coded, tables = _labels(model), set(_tables(model))
    return [
        tensor
        for tensor in _stored(model)
        if tensor.name in coded or ("FLOAT" in tensor.dtype and tensor.name not in tables)
    ]


def _stored(model: GraphFile) -> list[Initializer]:
    """Each stretch of data once: a tied head is the embedding under another name and in another shape."""
    places = {(tensor.file, tensor.offset) if tensor.file else tensor.name: tensor for tensor in model.tensors}
    return list(places.values())


def _tables(model: GraphFile) -> Iterator[str]:
    """Cosines and sines of rotary embeddings."""
    for node in model.nodes:
        roles = _TABLES.get((node.domain, node.op_type), ())
        yield from (node.input[role] for role in roles if role < len(node.input))


def _codes(model: GraphFile) -> Iterator[tuple[str, int]]:
    """Tensors of codes, and how many weights they are; the last block of a row may be longer than the row."""
    sizes = {tensor.name: 8 * tensor.bytes for tensor in model.tensors}
    for node in model.nodes:
        if node.op_type in _CODED:
            codes, bits = node.input[_CODED[node.op_type][0]], _attribute(node, "bits", _USUAL_BITS)
            yield codes, _attribute(node, "N", 0) * _attribute(node, "K", 0) or sizes.get(codes, 0) // bits
        elif node.op_type in _MOE:
            bits = _attribute(node, "expert_weight_bits", _USUAL_BITS)
            names = (node.input[i] for i in (2, 5, 8) if i < len(node.input))
            yield from ((name, sizes[name] // bits) for name in names if name in sizes)


def _labels(model: GraphFile) -> dict[str, str]:
    """Tensor -> `int4 block 32`, for everything that belongs to codes."""
    found: dict[str, str] = {}
    for node in model.nodes:
        for role in {**_CODED, **_MOE}.get(node.op_type, ()):
            if role < len(node.input) and node.input[role]:
                bits = _attribute(node, "expert_weight_bits" if node.op_type in _MOE else "bits", _USUAL_BITS)
                block = _attribute(node, "block_size", 0 if node.op_type in _MOE else _USUAL_BLOCK)
                found.setdefault(node.input[role], f"int{bits} block {block}" if block else f"int{bits}")
    return found


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def tokenizer_facts(folder: OnnxFolder) -> dict[str, Any]:
    """Size, special tokens, and which chat template: its hash and its first line."""
    try:
        tokenizer = TextTokenizer.from_directory(folder.directory)
    except DataError:
        return {"kind": None}
    template = ChatTemplate.find(folder.directory)
    stops = sorted(tokenizer.stop_ids | folder.stop_ids)
    return {
        "kind": type(tokenizer.backend.model).__name__,
        "tokens": tokenizer.backend.get_vocab_size(),
        "adds BOS": tokenizer.adds_bos,
        "bos": None if tokenizer.bos_id is None else _named(tokenizer, tokenizer.bos_id),
        "stops": [_named(tokenizer, token) for token in stops],
        "chat template": None if template is None else template.source.strip().split("\n")[0][:100],
        "chat template sha256": None if template is None else hashlib.sha256(template.source.encode()).hexdigest(),
    }


def _named(tokenizer: TextTokenizer, token: int) -> str:
    return f"{token} {tokenizer.text_of(token)!r}"


def made_from(model: GraphFile) -> dict[str, str]:
    """Return the `edgetune.*` metadata, without the receipt, which also lies beside the folder."""
    return {key: value for key, value in model.metadata.items() if key.startswith(keys.PREFIX) and key != keys.RECEIPT}


def tensor_facts(model: GraphFile, count: int | None = None) -> dict[str, Any]:
    """Name -> type, shape, bytes; the `count` largest, or all in their order."""
    labels = _labels(model)
    chosen = model.tensors if count is None else sorted(model.tensors, key=lambda tensor: -tensor.bytes)[:count]
    return {
        tensor.name: {
            "type": labels.get(tensor.name, tensor.dtype.lower()), "shape": list(tensor.shape), "bytes": tensor.bytes
        }
        for tensor in chosen
    }  # fmt: skip
