"""Random models of real shapes for the benchmarks, written piece by piece so that no large array is ever alive."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY, HEAD_DIM = 128_256, 64
PIECE = 1 << 22  # weights written at once


class Shape(NamedTuple):
    """The sizes of a Llama model."""

    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block, as (rows, columns)."""
        wide, narrow = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        return {
            "self_attn.q_proj": (wide, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, wide),
            "mlp.gate_proj": (self.feed_forward, self.hidden),
            "mlp.up_proj": (self.feed_forward, self.hidden),
            "mlp.down_proj": (self.hidden, self.feed_forward),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All tensors; the output matrix is the embedding."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            found |= {name + "input_layernorm.weight": (self.hidden,)}
            found |= {name + "post_attention_layernorm.weight": (self.hidden,)}
            found |= {f"{name}{module}.weight": shape for module, shape in self.linear.items()}
        return found | {"model.norm.weight": (self.hidden,)}


LLAMA_1B = Shape(2048, 8192, 32, 8, 16)  # Llama-3.2-1B: 1.24 billion weights
LLAMA_5B = Shape(3584, 14336, 56, 8, 25)  # 5.05 billion: four times as many
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_llama(directory: Path, shape: Shape, shard: int | None = None) -> None:
    """A model directory in bf16 with random weights and a byte-level vocabulary; in files of `shard` bytes, or one."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = list(_files(shape, shard))
    for name, tensors in files:
        _write_file(directory / name, tensors, rng)
    if len(files) > 1:
        places = {tensor: name for name, tensors in files for tensor in tensors}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": VOCABULARY - 256,
        "eos_token_id": VOCABULARY - 255,
    }
    (directory / "config.json").write_text(json.dumps(config))


def _files(shape: Shape, shard: int | None) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File name -> its tensors."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dimensions in shape.tensors.items():
        if shard and parts[-1] and 2 * sum(map(math.prod, parts[-1].values())) + 2 * math.prod(dimensions) > shard:
            parts.append({})
        parts[-1][name] = dimensions
    for number, part in enumerate(parts, 1):
        yield "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors", part


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            left = math.prod(shape)
            while left:
                count = min(PIECE, left)
                ones = np.ones(count, np.float32)
                values = ones if len(shape) == 1 else rng.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count


def _write_tokenizer(directory: Path) -> None:
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number in range(len(vocabulary), VOCABULARY - 256):
        vocabulary[f"filler{number}"] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *(f"<|special_{i}|>" for i in range(254))])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_adapter(directory: Path, base: Path, shape: Shape, *, rank: int = 16) -> None:
    """A LoRA adapter on all linear layers, as PEFT stores it."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(shape.layers):
        for module, (rows, columns) in shape.linear.items():
            name = f"base_model.model.model.layers.{layer}.{module}."
            tensors[name + "lora_A.weight"] = (rng.standard_normal((rank, columns)) * 0.02).astype(np.float32)
            tensors[name + "lora_B.weight"] = (rng.standard_normal((rows, rank)) * 0.02).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [module.split(".")[1] for module in shape.linear],
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
