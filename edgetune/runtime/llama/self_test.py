"""`python -m edgetune.runtime.llama.self_test`: write, quantize, run and compare a model of 0.5 MB.

`edgetune doctor` runs it in a process of its own: a llama.cpp that was built for another CPU crashes its process with
an illegal instruction or a segmentation fault.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune.runtime.llama.runtime import LlamaRuntime
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.gguf.values import Value, f32, f32s, i32s, string, strings, u32
from edgetune_converters.gguf.writer import GgufWriter

HIDDEN = 256
TYPES = ("q4_k", "q8_0")
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_CONTROL, _BYTE = 3, 6  # token types of GGUF

METADATA: dict[str, Value] = {
    "general.architecture": string("llama"),
    "llama.block_count": u32(1),
    "llama.context_length": u32(64),
    "llama.embedding_length": u32(HIDDEN),
    "llama.feed_forward_length": u32(HIDDEN),
    "llama.attention.head_count": u32(4),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "tokenizer.ggml.model": string("llama"),
    "tokenizer.ggml.tokens": strings(TOKENS),
    "tokenizer.ggml.scores": f32s([0.0] * len(TOKENS)),
    "tokenizer.ggml.token_type": i32s([_CONTROL] * 3 + [_BYTE] * 256),
    "tokenizer.ggml.eos_token_id": u32(2),
}
MATRICES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def tensors() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield name and weights of all tensors, the same in every run."""
    random = np.random.default_rng(0)
    for name in ("token_embd", "output"):
        yield f"{name}.weight", random.normal(0, 1, (len(TOKENS), HIDDEN)).astype(np.float32)
    for name in MATRICES:
        yield f"blk.0.{name}.weight", random.normal(0, HIDDEN**-0.5, (HIDDEN, HIDDEN)).astype(np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        yield f"{name}.weight", np.full(HIDDEN, 0.2, np.float32)


def write(path: Path, type_: str) -> Path:
    """Write the model with all matrices in one storage type."""
    weights = dict(tensors())
    types = {name: type_ if array.ndim == 2 else "f32" for name, array in weights.items()}
    specs = [TensorSpec(name, array.shape, BY_NAME[types[name]]) for name, array in weights.items()]
    with GgufWriter.open(path, METADATA, specs) as writer:
        for name, array in weights.items():
            writer.append(array if types[name] == "f32" else edgetune_native.quantize(array, types[name]))
        writer.verify()
        writer.publish()
    return path


def logits(path: Path) -> NDArray[np.float32]:
    """Return the logits [31, V] for a fixed text."""
    ids = np.arange(40, 72, dtype=np.int32)
    with LlamaRuntime(path) as runtime:
        return np.concatenate([block.copy() for block in runtime.score(ids, np.arange(1, len(ids)))])


def run() -> dict[str, float]:
    """Return storage type -> mean KL divergence from f32, in nats."""
    with tempfile.TemporaryDirectory() as folder:
        exact = logits(write(Path(folder) / "f32.gguf", "f32"))
        targets = np.zeros(len(exact), np.int64)
        found = {type_: logits(write(Path(folder) / f"{type_}.gguf", type_)) for type_ in TYPES}
    return {type_: float(edgetune_native.compare(exact, each, targets).kld.mean()) for type_, each in found.items()}


if __name__ == "__main__":
    print(json.dumps(run()))
