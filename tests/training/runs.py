"""Tiny bases, data and configurations for training in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.converters import vocabularies
from tests.data import templates

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
COLOURS = ("red", "green", "blue", "white")


def make_base(directory: Path, dtype: str = "bfloat16") -> Path:
    """A random Llama with a byte-level tokenizer and a ChatML template."""
    import torch
    import transformers

    vocabularies.byte_level(directory, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """Questions with one right answer each."""
    rows = []
    for number in range(start, start + count):
        colour = COLOURS[number % len(COLOURS)]
        question = f"lamp {number} {colour}?" + " please" * (number % 5)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(base: Path, folder: Path, **training: Any) -> dict[str, Any]:
    """A configuration as a mapping, its data files written into `folder`."""
    return {
        "base": str(base),
        "data": {
            "train": str(write_rows(folder / "train.jsonl", 64)),
            "validation": str(write_rows(folder / "validation.jsonl", 8, 64)),
            "test": str(write_rows(folder / "test.jsonl", 6, 72)),
        },
        "adapter": {"r": 8, "alpha": 16},
        "training": {
            "batch_size": 4, "max_steps": 6, "logging_steps": 1, "eval_steps": 3, "save_steps": 3, "max_length": 64,
            "learning_rate": 5e-3, **training,
        },
        "reference": {"rows": 4, "task_rows": 6, "max_new_tokens": 8},
        "export": {"types": ["q8_0"]},
    }  # fmt: skip


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """The mapping as YAML."""
    path.write_text(yaml.safe_dump(values))
    return path
