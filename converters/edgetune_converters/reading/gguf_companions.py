"""The files beside the weights of a model directory, rebuilt from a GGUF file: config.json and the tokenizer's.

transformers must build the same model from config.json that llama.cpp builds from the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.architectures import ModelConfig, slots
from edgetune_converters.architectures.model_types import MODEL_TYPES
from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.companions import write_json
from edgetune_converters.reading.gguf_base import GgufBase
from edgetune_converters.reading.gguf_config import HINT
from edgetune_converters.tokenizers import rebuild


def write_companions(base: GgufBase, directory: Path) -> list[str]:
    """Write what transformers needs beside the weights of a GGUF file, and return remarks.

    Raises:
        CheckpointError: config.json cannot state the model.
        TokenizerError: The tokenizer cannot be rebuilt.
    """
    check_config(base)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", stated_config(base))
    return write_tokenizer(base, directory)


def write_tokenizer(base: GgufBase, directory: Path) -> list[str]:
    """Write generation_config.json, the tokenizer's files and the chat templates of a GGUF file, and return remarks.

    Raises TokenizerError.
    """
    metadata = base.file.metadata
    write_stops_and_templates(base, directory)
    context = base.config.get("max_position_embeddings")
    return rebuild.write_tokenizer(metadata, base.vocabulary(None).metadata, context, directory)


def write_stops_and_templates(base: GgufBase, directory: Path) -> None:
    """Write generation_config.json and the chat templates of a GGUF file."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "generation_config.json", rebuild.generation_config(base.file.metadata))
    rebuild.write_templates(base.file.metadata, directory)


def stated_config(base: GgufBase) -> dict[str, Any]:
    """Return config.json; complete where transformers has a class for the model."""
    config = dict(base.config)
    architecture = config["architectures"][0]
    if architecture not in MODEL_TYPES:
        return config
    for complete in _COMPLETED:
        config |= complete(base, ModelConfig(config).completed(base.family.defaults))
    for field in _PROPERTIES.get(architecture, ()):
        config.pop(field, None)
    return {**config, "model_type": MODEL_TYPES[architecture]}


def check_config(base: GgufBase) -> None:
    """Raise CheckpointError where transformers cannot build the model of the file from a config.json."""
    if base.config["architectures"][0] not in MODEL_TYPES:
        raise CheckpointError(
            f"{base.path} is a model of the family {base.family.name}, for which transformers has no class", HINT
        )
    check_rope(base)


def check_rope(base: GgufBase) -> None:
    """Raise CheckpointError where the file holds RoPE factors that no parameters of config.json give."""
    if base.carried:
        names = ", ".join(slots.gguf_name(slot, None, "weight") for slot, _ in base.carried)
        raise CheckpointError(f"{base.path} holds {names}, which no RoPE parameters of config.json give", HINT)


# -- fields that transformers needs and that are not a key of the file -------------------------------------------------


def _special_tokens(base: GgufBase, config: ModelConfig) -> dict[str, Any]:
    """Ids of the special tokens, null where the file has none: classes assume ids of the first model of a family."""
    roles = {"bos": "bos", "eos": "eos", "padding": "pad"}
    found = {name: base.file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in roles.items()}
    return {f"{name}_token_id": number for name, number in found.items()}


# field -> endings of the names of the biases that it announces
_BIASES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("self_attn.q_proj.bias", "self_attn.qkv_proj.bias", "attention.query_key_value.bias"),
    "use_qkv_bias": ("self_attn.q_proj.bias",),
    "mlp_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "use_bias": ("self_attn.q_proj.bias",),
    "bias": ("self_attention.query_key_value.bias",),
}


def _biases(base: GgufBase, config: ModelConfig) -> dict[str, Any]:
    """Whether layers have biases, by the tensors of the file."""
    return {field: any(name.endswith(endings) for name in base.tensors) for field, endings in _BIASES.items()}


# usual name of a field -> its names in single classes, which know no other
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon"),
    "rms_norm_eps": ("norm_eps",),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_key_value_heads": ("num_kv_heads",),
}


def _spellings(base: GgufBase, config: ModelConfig) -> dict[str, Any]:
    raw = config.raw
    return {name: raw[field] for field, names in _SPELLINGS.items() if raw.get(field) is not None for name in names}


def _rope(base: GgufBase, config: ModelConfig) -> dict[str, Any]:
    """RoPE parameters as transformers 5 has them: with the rotated share, and one set for each kind of layer."""
    stated = {"rope_type": "default", **config.raw["rope_parameters"]}
    share = config.raw.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        stated["partial_rotary_factor"] = share
    architecture = base.config["architectures"][0]
    if architecture not in _LOCAL_ROPE:
        return {"rope_parameters": stated}
    field = _LOCAL_ROPE[architecture]
    plain = {"rope_type": "default", "rope_theta": config.raw[field] if field else stated["rope_theta"]}
    return {"rope_parameters": {"full_attention": stated, "sliding_attention": plain}}


# classes with RoPE parameters for each kind of layer -> the field of the base frequency under the window; None: no own
_LOCAL_ROPE = {"Gemma3ForCausalLM": "rope_local_base_freq", "Olmo3ForCausalLM": None}


def _own(base: GgufBase, config: ModelConfig) -> dict[str, Any]:
    make = _OF_ARCHITECTURE.get(base.config["architectures"][0])
    return {} if make is None else make(config)


def _low_rank_attention(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek: in the file one head of key and value is compressed, in transformers every head has its own."""
    return {
        "num_key_value_heads": config.heads,
        "head_dim": config.integer("qk_rope_head_dim"),
        "partial_rotary_factor": 1.0,
        "q_lora_rank": config.get("q_lora_rank"),
    }


def _attention_of_mpt(config: ModelConfig) -> dict[str, Any]:
    stated = config.raw.get("attn_config") or {}
    slopes = {"alibi_bias_max": int(stated["alibi_bias_max"])} if "alibi_bias_max" in stated else {}
    return {"attn_config": {**stated, **slopes}, "expansion_ratio": config.ffn // config.hidden}


_OF_ARCHITECTURE: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "DeepseekV2ForCausalLM": _low_rank_attention,
    "DeepseekV3ForCausalLM": _low_rank_attention,
    "MptForCausalLM": _attention_of_mpt,
    "Exaone4ForCausalLM": lambda config: {
        "sliding_window": config.get("sliding_window"),
        "layer_types": config.get("layer_types", ["full_attention"] * config.layers),
    },
    "Phi3ForCausalLM": lambda config: {
        "original_max_position_embeddings": config.rope["original_max_position_embeddings"]
        or config.get("max_position_embeddings")
    },
}
# fields that a class computes, and that cannot be set
_PROPERTIES = {"FalconForCausalLM": ("head_dim",)}
_COMPLETED: tuple[Callable[[GgufBase, ModelConfig], dict[str, Any]], ...] = (
    _special_tokens, _biases, _spellings, _own, _rope,
)  # fmt: skip
