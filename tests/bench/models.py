"""Random models of real shapes for the benchmarks, written piece by piece so that no large array is ever alive."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# Llama-3.2-1B
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 8192, 32, 8, 64, 128_256
LINEAR = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
PIECE = 1 << 22  # weights written at once
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (HIDDEN,)
        yield name + "post_attention_layernorm.weight", (HIDDEN,)
        for module, shape in LINEAR.items():
            yield f"{name}{module}.weight", shape
    yield "model.norm.weight", (HIDDEN,)


def write_llama(directory: Path, *, layers: int) -> None:
    """A model directory of Llama-3.2-1B's shape in bf16 with random weights and a byte-level vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    offset = 0
    for name, shape in _tensors(layers):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in _tensors(layers):
            left = int(np.prod(shape))
            while left:
                count = min(PIECE, left)
                ones = np.ones(count, np.float32)
                values = ones if len(shape) == 1 else rng.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count
    _write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
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


def write_adapter(directory: Path, base: Path, *, layers: int, rank: int = 16) -> None:
    """A LoRA adapter on all linear layers, as PEFT stores it."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in LINEAR.items():
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
        "target_modules": [module.split(".")[1] for module in LINEAR],
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
