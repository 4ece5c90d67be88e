"""Facts about an ONNX folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgetune.data.chat import ChatTemplate
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
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
from edgetune.runtime.onnx import model_file
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.model_file import GraphFile, Initializer
from edgetune_converters.gguf import keys

# operator with quantized weights -> its inputs that are codes, scales and zero points
_CODED = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
_MOE = {"QMoE": tuple(range(2, 14))}
_TABLES = {("com.microsoft", "GroupQueryAttention"): (7, 8), ("com.microsoft", "RotaryEmbedding"): (2, 3),
           ("", "RotaryEmbedding"): (1, 2)}  # fmt: skip
_DEFAULT_BITS, _DEFAULT_BLOCK = 4, 128  # of attributes that a node omits


class _Model(NamedTuple):
    """An open ONNX folder and its graph."""

    folder: OnnxFolder
    graph: GraphFile


def describe(path: Path, all_tensors: bool = False) -> Facts:
    """Return section -> fact -> value. Raises ArtifactError if the path is no complete ONNX folder."""
    folder = OnnxFolder.open(path)
    model = _Model(folder, model_file.read(folder.graph))
    return {
        **read_sections(model, _SECTIONS),
        **neighbor_facts(folder.directory),
        **tensor_facts(_tensors(model.graph, model.graph.tensors), all_tensors=all_tensors),
    }


def _tensors(graph: GraphFile, initializers: Sequence[Initializer]) -> list[StoredTensor]:
    labels = _labels(graph)
    return [
        StoredTensor(tensor.name, labels.get(tensor.name, tensor.dtype.lower()), tensor.shape, tensor.bytes)
        for tensor in initializers
    ]


def _file_facts(model: _Model) -> Facts:
    folder, graph = model
    weights, stored = _count_weights(graph), sum(tensor.bytes for tensor in _weights(graph))
    opsets = {entry.domain or "ai.onnx": entry.version for entry in graph.proto.opset_import}
    return {
        "path": str(folder.path),
        "bytes": graph.size,
        "onnx operator sets": ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
        "parameters": weights,
        "bits per weight": bits_per_weight(stored, weights),
        "tensors": len(graph.tensors),
        "data": ", ".join(file.name for file in graph.data_files) or "inside the graph",
    }


def _model_facts(model: _Model) -> Facts:
    """Return the producer of the graph, and the scalars of genai_config.json under their names."""
    folder, graph = model
    scalars = {key: value for key, value in folder.genai.items() if not isinstance(value, (dict, list))}
    decoder = {key: value for key, value in folder.decoder.items() if isinstance(value, int)}
    return {"producer": f"{graph.proto.producer_name} {graph.proto.producer_version}".strip(), **scalars, **decoder}


def _operator_facts(model: _Model) -> Facts:
    """Return operator -> count, the most frequent first."""
    counts = Counter(f"{node.domain or 'ai.onnx'}.{node.op_type}" for node in model.graph.nodes)
    return dict(counts.most_common())


def _tokenizer_facts(model: _Model) -> Facts:
    """Return kind, size, special tokens and chat template."""
    folder = model.folder
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
        "bos": None if tokenizer.bos_id is None else _format_token(tokenizer, tokenizer.bos_id),
        "stops": [_format_token(tokenizer, token) for token in stops],
        **template_facts(None if template is None else template.source),
    }


def _format_token(tokenizer: TextTokenizer, token: int) -> str:
    return f"{token} {tokenizer.text_of(token)!r}"


def _origin_facts(model: _Model) -> Facts:
    """Return the `edgetune.*` keys of the metadata without the receipt, which has a section of its own."""
    metadata = model.graph.metadata
    return {key: value for key, value in metadata.items() if key.startswith(keys.PREFIX) and key != keys.RECEIPT}


def _count_weights(model: GraphFile) -> int:
    """Count the weights: codes by their bits; neither scales and zero points, nor integers and tables."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in model.tensors}
    counts |= dict.fromkeys(_labels(model), 0) | dict(_codes(model))
    return sum(counts[tensor.name] for tensor in _weights(model))


def _weights(model: GraphFile) -> list[Initializer]:
    """List floats, and codes with their scales and zero points; neither tables nor integers."""
    coded, tables = _labels(model), set(_tables(model))
    return [
        tensor
        for tensor in _stored(model)
        if tensor.name in coded or ("FLOAT" in tensor.dtype and tensor.name not in tables)
    ]


def _stored(model: GraphFile) -> list[Initializer]:
    """List each range of data once: a tied head is the embedding under another name and in another shape."""
    places = {(tensor.file, tensor.offset) if tensor.file else tensor.name: tensor for tensor in model.tensors}
    return list(places.values())


def _tables(model: GraphFile) -> Iterator[str]:
    """Yield the names of the cosines and sines of rotary embeddings."""
    for node in model.nodes:
        roles = _TABLES.get((node.domain, node.op_type), ())
        yield from (node.input[role] for role in roles if role < len(node.input))


def _codes(model: GraphFile) -> Iterator[tuple[str, int]]:
    """Yield tensors of codes and their numbers of weights; the last block of a row may be longer than the row."""
    sizes = {tensor.name: 8 * tensor.bytes for tensor in model.tensors}
    for node in model.nodes:
        if node.op_type in _CODED:
            codes, bits = node.input[_CODED[node.op_type][0]], _attribute(node, "bits", _DEFAULT_BITS)
            yield codes, _attribute(node, "N", 0) * _attribute(node, "K", 0) or sizes.get(codes, 0) // bits
        elif node.op_type in _MOE:
            bits = _attribute(node, "expert_weight_bits", _DEFAULT_BITS)
            names = (node.input[i] for i in (2, 5, 8) if i < len(node.input))
            yield from ((name, sizes[name] // bits) for name in names if name in sizes)


def _labels(model: GraphFile) -> dict[str, str]:
    """Return tensor -> `int4 block 32`, for codes with their scales and zero points."""
    found: dict[str, str] = {}
    for node in model.nodes:
        for role in {**_CODED, **_MOE}.get(node.op_type, ()):
            if role < len(node.input) and node.input[role]:
                bits = _attribute(node, "expert_weight_bits" if node.op_type in _MOE else "bits", _DEFAULT_BITS)
                block = _attribute(node, "block_size", 0 if node.op_type in _MOE else _DEFAULT_BLOCK)
                found.setdefault(node.input[role], f"int{bits} block {block}" if block else f"int{bits}")
    return found


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


_SECTIONS: Mapping[str, Callable[[_Model], Facts]] = {
    "file": _file_facts,
    "model": _model_facts,
    "types": lambda model: type_mix(_tensors(model.graph, _stored(model.graph))),
    "operators": _operator_facts,
    "tokenizer": _tokenizer_facts,
    "made from": _origin_facts,
}
