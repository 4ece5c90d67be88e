"""Tiny random models of each family with awkward options, and PEFT adapters for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.converters import vocabularies

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

POSITIONS = 224

# hidden 96 is not heads x head_dim, two query heads share one key head, nothing is a power of two
_COMMON = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "vocab_size": 523,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

# name -> (config class, options)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 24, "rope_parameters": _LINEAR}),
    "llama3-rope": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 250}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen2-yarn": ("Qwen2Config", {"tie_word_embeddings": False, "head_dim": None, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def base(name: str, directory: Path, *, seed: int = 0, dtype: str = "float32", **options: Any) -> Path:
    """Write a random model of `MODELS[name]` with a tokenizer, smaller than its vocabulary."""
    kind, own = MODELS[name]
    stated = {**_COMMON, **own, **options}
    config = getattr(transformers, kind)(**{key: value for key, value in stated.items() if value is not None})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="300KB" if name == "llama" else "5GB")
    vocabularies.byte_level(directory)
    return directory


@contextmanager
def _between_libraries() -> Iterator[None]:
    """PEFT uses names that transformers has deprecated, and warns about every tied model; neither concerns us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_between_libraries()
def adapter(base_directory: Path, directory: Path, *, seed: int = 1, **options: Any) -> Path:
    """A LoRA adapter on all linear layers with random, non-zero A and B, written by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(directory)
    return directory


@_between_libraries()
def torch_logits(base_directory: Path, adapter_directory: Path | None, ids: list[int]) -> NDArray[np.float32]:
    """Logits of PEFT's own forward in f32, [len(ids), vocabulary]; nothing is merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base_directory, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter_directory is not None:
        model = peft.PeftModel.from_pretrained(model, adapter_directory)
    with torch.no_grad():
        found: NDArray[np.float32] = model.eval()(torch.tensor([ids])).logits[0].float().numpy()
    return found


def random_ids(count: int = POSITIONS, vocab: int = 523, seed: int = 2) -> list[int]:
    """Token ids over the whole embedding, including padding rows."""
    return [int(number) for number in np.random.default_rng(seed).integers(0, vocab, count)]


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, float]:
    """Mean KL divergence in nats and the share of positions with the same best token."""
    p, q = _log_softmax(reference), _log_softmax(other)
    kld = np.sum(np.exp(p) * (p - q), axis=1)
    return float(kld.mean()), float(np.mean(reference.argmax(1) == other.argmax(1)))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    wide: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return wide
