"""Read the config.json from which a GGUF file was made back from its metadata, and find its family.

The result is verified: the family's rows must reproduce the file's values from the config. A key that no row produces,
or that comes out different, is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures import FAMILIES, Family, ModelConfig, slots
from edgetune_converters.architectures.rope import llama3_factors
from edgetune_converters.errors import ArchitectureError, CheckpointError
from edgetune_converters.gguf.joined import JoinedFile
from edgetune_converters.gguf.values import Plain, as_read

HINT = "Give the Hugging Face model that the file was made from"

# key of the file, without the architecture -> field of config.json
_FIELDS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
    "rope.freq_base_swa": "rope_local_base_freq",
    # experts
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
    # attention through low ranks
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "shortconv.l_cache": "conv_L_cache",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
}
_ROPE_FIELDS: Mapping[str, str] = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_FACTORS: Mapping[str, str] = {slots.ROPE_FACTORS_LONG: "long_factor", slots.ROPE_FACTORS_SHORT: "short_factor"}
_TOKEN_FIELDS = {"tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id"}
# what the table raises for invalid or missing values
_UNREADABLE = (ArchitectureError, TypeError, ValueError, ArithmeticError, AttributeError, struct.error)


def config_of(file: JoinedFile) -> tuple[dict[str, Any], Family]:
    """Return a config.json that reproduces the metadata of the file, and its family. Raises CheckpointError."""
    arch = file.metadata.get("general.architecture")
    families = [family for family in FAMILIES if family.gguf == arch]
    if not families:
        raise CheckpointError(f"{file.path} is of the architecture {arch!r}, which is not known here", HINT)
    own = {
        key.removeprefix(f"{arch}."): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(f"{arch}.")
    }
    plain = _plain_config(file, own)
    reasons = []
    for family in families:
        config = {**plain, **family.implied, "architectures": [family.hf[0]]}
        problems = list(_unlike(family, ModelConfig(config).completed(family.defaults), own))
        if not problems:
            return config, family
        reasons.append(problems)
    raise CheckpointError.of_many(f"keys of {file.path} that cannot be read back", min(reasons, key=len), HINT)


def _shortest(value: Plain) -> Plain:
    """A float with the fewest digits that its 32 bits need: 1e-06 instead of 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _plain_config(file: JoinedFile, own: Mapping[str, Plain]) -> dict[str, Any]:
    """The fields of config.json that correspond to one key each."""
    names = {entry.name: entry for entry in file.tensors}
    config: dict[str, Any] = {field: own[key] for key, field in _FIELDS.items() if key in own}
    config |= {field: file.metadata[key] for key, field in _TOKEN_FIELDS.items() if key in file.metadata}
    config["rope_parameters"] = _rope(file, own)
    config.setdefault("num_key_value_heads", own.get("attention.head_count"))
    for derive in _DERIVED:
        config |= derive(own)
    config["rope_parameters"] |= _llama3(file, config)
    config |= _scale_of_gemma(file.metadata.get("general.architecture"), config)
    embedding = names.get("token_embd.weight")
    config["vocab_size"] = own.get("vocab_size", embedding.shape[0] if embedding else None)
    config["tie_word_embeddings"] = "output.weight" not in names
    config["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in names else 1
    if "blk.0.attn_q_norm.weight" in names:  # the names in two families
        config |= {"use_qk_norm": True, "qk_layernorm": True}
    config["_name_or_path"] = file.metadata.get("general.name")
    return config


def _rope(file: JoinedFile, own: Mapping[str, Plain]) -> dict[str, Any]:
    """RoPE parameters; the base frequency is 10000 where the file has none."""
    rope: dict[str, Any] = {field: own[key] for key, field in _ROPE_FIELDS.items() if key in own}
    if rope.get("rope_type") == "none":
        del rope["rope_type"]
    for slot, field in _FACTORS.items():
        name = slots.gguf_name(slot, None, "weight")
        if any(entry.name == name and entry.type == "f32" for entry in file.tensors):
            rope[field] = [float(number) for number in file.tensor(name).view(np.float32).reshape(-1)]
            rope["rope_type"] = "longrope"
    attention, factor = own.get("rope.scaling.attn_factor"), rope.get("factor")
    if isinstance(attention, float):
        usual = 1 + 0.1 * math.log(factor) if rope.get("rope_type") == "yarn" and _positive(factor) else 1.0
        rope["attention_factor"] = attention * usual
    multiplier = own.get("rope.scaling.yarn_log_multiplier")
    if isinstance(multiplier, float):
        rope |= {"mscale": multiplier * 10, "mscale_all_dim": multiplier * 10}
    return rope | {"rope_theta": own.get("rope.freq_base", 10000.0)}


def _scale_of_gemma(arch: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Scale attention as llama.cpp does: by the head size or, in the 27 B model, by hidden size per head."""
    if arch not in _LAYERS_OF_27B:
        return {}
    hidden, heads, width = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if config.get("num_hidden_layers") == _LAYERS_OF_27B[arch] and _positive(hidden) and _positive(heads):
        width = int(hidden) // int(heads)
    return {} if width is None else {"query_pre_attn_scalar": width}


_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def _llama3(file: JoinedFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that give the factors of the file to the bit; {} without them.

    Between the two wavelengths the reciprocal of a factor is linear in the frequency. Only ratios of the parameters
    matter, so low_freq_factor is 1.
    """
    name = slots.gguf_name(slots.ROPE_FACTORS, None, "weight")
    if not any(entry.name == name and entry.type == "f32" for entry in file.tensors):
        return {}
    factors = file.tensor(name).view(np.float32).reshape(-1)
    plain = ModelConfig({**config, "rope_parameters": {**config["rope_parameters"], "rope_type": "default"}})
    try:
        for found in _llama3_candidates(factors, plain):
            stated = ModelConfig({**config, "rope_parameters": {**config["rope_parameters"], **found}})
            made = llama3_factors(stated)
            if made is not None and np.array_equal(made, factors):
                return found
    except _UNREADABLE:
        pass
    return {}


def _llama3_candidates(factors: NDArray[np.float32], config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield parameters that may give these factors: fitted to those between the two wavelengths, then the usual."""
    factor = float(factors.max())
    found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    base, width = float(config.rope["rope_theta"]), config.rope_dim
    waves = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    between = np.flatnonzero((factors > 1) & (factors < factor))
    blend = (1 / factors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    if len(between) > 1:
        slope, start = np.polyfit(1 / waves[between], blend, 1)
        original = round(-slope / start)
        yield found | {"high_freq_factor": round(1 - 1 / start, 3), "original_max_position_embeddings": original}
    fitted = [round((3 * share + 1) * wave) for share, wave in zip(blend, waves[between], strict=True)]
    for original in (*fitted, 8192):
        yield found | {"high_freq_factor": 4.0, "original_max_position_embeddings": original}


def _positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < math.inf


# -- fields that are not simply a key ----------------------------------------------------------------------------------


def _scales(own: Mapping[str, Plain]) -> dict[str, Any]:
    """Families name the scale of the logits in two ways; MiniCPM has its own names for all three scales."""
    found = {name: own["logit_scale"] for name in ("logit_scale", "logits_scaling") if "logit_scale" in own}
    keys = ("embedding_scale", "residual_scale", "logit_scale", "embedding_length", "block_count")
    numbers = [own.get(key) for key in keys]
    if not all(_positive(number) for number in numbers):
        return found
    embedding, residual, logits, hidden, layers = (float(str(number)) for number in numbers)
    scales = {"scale_emb": embedding, "scale_depth": residual * layers**0.5, "dim_model_base": hidden / logits}
    return found | scales


def _kinds_of_layers(own: Mapping[str, Plain]) -> dict[str, Any]:
    """Which layers have a window; in LFM2, layers without key heads are convolutions."""
    pattern, heads = own.get("attention.sliding_window_pattern"), own.get("attention.head_count_kv")
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    if isinstance(heads, list) and heads and all(type(count) is int for count in heads):
        kinds = ["full_attention" if count else "conv" for count in heads]
        return {"layer_types": kinds, "num_key_value_heads": max(heads)}
    return {}


def _widths_of_llama4(own: Mapping[str, Plain]) -> dict[str, Any]:
    """Llama 4 uses the name of a dense layer's width for that of an expert."""
    if "interleave_moe_layer_step" not in own:
        return {}
    return {
        "intermediate_size_mlp": own.get("feed_forward_length"),
        "intermediate_size": own.get("expert_feed_forward_length"),
    }


def _rotated(own: Mapping[str, Plain]) -> dict[str, Any]:
    """The share of a head that is rotated, such that it gives the same number of dimensions again."""
    hidden, heads = own.get("embedding_length"), own.get("attention.head_count")
    shared = hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None
    rotated, width = own.get("rope.dimension_count"), own.get("attention.key_length", shared)
    if type(rotated) is not int or type(width) is not int or not 0 < rotated < width:
        return {"partial_rotary_factor": 1.0}
    share = rotated / width
    return {"partial_rotary_factor": share if int(width * share) == rotated else math.nextafter(share, 1)}


def _low_ranks(own: Mapping[str, Plain]) -> dict[str, Any]:
    rotated, width = own.get("rope.dimension_count"), own.get("attention.key_length_mla")
    if type(rotated) is not int or type(width) is not int:
        return {}
    return {"qk_rope_head_dim": rotated, "qk_nope_head_dim": width - rotated}


def _attention_of_mpt(own: Mapping[str, Plain]) -> dict[str, Any]:
    keys = {"clip_qkv": "attention.clamp_kqv", "alibi_bias_max": "attention.max_alibi_bias"}
    found = {field: own[key] for field, key in keys.items() if key in own}
    return {"attn_config": found} if found else {}


_DERIVED: tuple[Callable[[Mapping[str, Plain]], dict[str, Any]], ...] = (
    _scales, _kinds_of_layers, _widths_of_llama4, _rotated, _low_ranks, _attention_of_mpt,
)  # fmt: skip


# -- the proof ---------------------------------------------------------------------------------------------------------


def _unlike(family: Family, config: ModelConfig, own: Mapping[str, Plain]) -> Iterator[str]:
    """Where the table's metadata differ from the file's; a key that is not written must have no effect."""
    made: dict[str, Plain] = {}
    for key, make in family.metadata:
        try:
            written = make(config)
            if written is not None:
                made[key] = _shortest(as_read(written))
        except _UNREADABLE as error:
            yield f"{family.gguf}.{key}: {error}"
    for row in family.generated:
        try:
            row.compute(config)
        except _UNREADABLE as error:
            yield f"{slots.gguf_name(row.slot, None, 'weight')}: {error}"
    for key, value in own.items():
        single = value[0] if isinstance(value, list) and len(value) == 1 else value
        if key in made and made[key] not in (value, single):
            yield f"{family.gguf}.{key} is {value!r}, read back as {made[key]!r}"
        elif key not in made and not _says_nothing(key, value, own):
            yield f"{family.gguf}.{key} is {value!r}, for which there is no field"


def _says_nothing(key: str, value: Plain, own: Mapping[str, Plain]) -> bool:
    """Whether a key of another writer has no effect: readers assume the value anyway, or ignore it."""
    nothing: Mapping[str, Callable[[], bool]] = {
        "tensor_data_layout": lambda: True,
        "attention.sliding_window": lambda: value == 0,
        "rope.scaling.type": lambda: value == "none",
        "rope.scaling.original_context_length": lambda: "rope.scaling.type" not in own,
        "rope.freq_base_swa": lambda: value == own.get("rope.freq_base", 10000.0),
    }
    return key in nothing and nothing[key]()
