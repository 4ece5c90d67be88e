"""A tiny random model of every family, with deliberately awkward options.

No size is a power of two, heads do not divide the hidden size where the family allows that, and windows and original
contexts are shorter than the text.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.converters import tiny, vocabularies
from tests.converters.tiny import torch, transformers

POSITIONS = 512

_COMMON: dict[str, Any] = {
    "vocab_size": 523, "initializer_range": 0.12, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# 4 heads of 24 for a hidden size of 72
_USUAL = _COMMON | {
    "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 640,
}  # fmt: skip
# where llama.cpp needs heads that divide the hidden size: 6 heads of 12
_EVEN = {key: value for key, value in _USUAL.items() if key != "head_dim"} | {"num_attention_heads": 6}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 5, "num_local_experts": 5}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 160}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 160,
}  # fmt: skip
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.5], "partial_rotary_factor": 0.67,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its config, the number of compared tokens, and a change of its directory after saving."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    positions: int = POSITIONS
    after: Callable[[Path], None] | None = None
    seed: int = 0  # a different seed where two tokens of a random model tie to six digits
    alibi: bool = False  # the reference uses ALiBi, which transformers' code of the family lacks, instead of RoPE


# families with GELU, which llama.cpp looks up in a table of 16-bit floats: smaller weights amplify its error less
_GELU = {"initializer_range": 0.04}

_GPT = _COMMON | {"n_embd": 72, "n_layer": 3, "n_head": 6, "n_positions": 640}
_MLA = {key: value for key, value in _EVEN.items() if key != "num_key_value_heads"} | {
    "num_key_value_heads": 6, "kv_lora_rank": 28, "qk_nope_head_dim": 14, "qk_rope_head_dim": 10, "v_head_dim": 18,
    "head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 5, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40, "routed_scaling_factor": 1.5,
}  # fmt: skip
_DEEP_YARN = _YARN | {"mscale": 0.8, "mscale_all_dim": 0.8, "beta_fast": 32.0, "beta_slow": 1.0}
_SCALES = {
    "embedding_multiplier": 3.0, "attention_multiplier": 12**-0.5, "residual_multiplier": 0.7, "logits_scaling": 1.5,
}  # fmt: skip
_GEMMA3 = _USUAL | _GELU | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 100,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    },
}  # fmt: skip
_LLAMA4 = _EVEN | {
    "head_dim": 20, "num_hidden_layers": 5, "num_local_experts": 5, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2, "intermediate_size_mlp": 88, "rope_parameters": _LLAMA3,
}  # fmt: skip
_EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
}  # fmt: skip
# families without shared key heads
_UNSHARED = {key: value for key, value in _EVEN.items() if key != "num_key_value_heads"}
_FALCON = {
    key: value for key, value in _EVEN.items() if key not in ("num_key_value_heads", "intermediate_size")
} | _GELU

CASES: dict[str, Case] = {
    "llama": Case(
        "LlamaConfig",
        _USUAL
        | {"mlp_bias": True, "attention_bias": True, "rope_parameters": _YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
    "mistral": Case("MistralConfig", _USUAL | {"sliding_window": 600}),
    "qwen2": Case("Qwen2Config", _EVEN | {"rope_parameters": _YARN | {"attention_factor": 1.3}}),
    "qwen3": Case("Qwen3Config", _USUAL | {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "gemma": Case("GemmaConfig", _USUAL | _GELU | {"num_key_value_heads": 1}),
    "gemma2": Case(
        "Gemma2Config",
        _USUAL
        | _GELU
        | {
            "sliding_window": 100,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case("Gemma3TextConfig", _GEMMA3),
    "gemma3-untied": Case(
        "Gemma3TextConfig",
        _USUAL | _GELU | {"tie_word_embeddings": False, "sliding_window": 600, "query_pre_attn_scalar": 24},
    ),
    "phi3": Case("Phi3Config", _EVEN),
    "phi3-long": Case("Phi3Config", _EVEN | {"rope_parameters": _LONG, "original_max_position_embeddings": 256}),
    "phi3-long-short-text": Case(
        "Phi3Config", _EVEN | {"rope_parameters": _LONG, "original_max_position_embeddings": 256}, positions=200
    ),
    "phi2": Case("PhiConfig", _EVEN | {"rope_parameters": _HALF}),
    "mixtral": Case("MixtralConfig", _USUAL | _EXPERTS),
    "mixtral-fused": Case("MixtralConfig", _USUAL | _EXPERTS, after=lambda directory: _fuse(directory)),
    "qwen2moe": Case(
        "Qwen2MoeConfig", _EVEN | _EXPERTS | {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56}
    ),
    "qwen3moe": Case(
        "Qwen3MoeConfig",
        _USUAL | _EXPERTS | {"moe_intermediate_size": 40, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "granitemoe": Case(
        "GraniteMoeConfig",
        _EVEN
        | _EXPERTS
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "rope_parameters": _LLAMA3,
        },
    ),
    "smollm3": Case("SmolLM3Config", _USUAL | {"num_hidden_layers": 5, "rope_parameters": _YARN}),
    "stablelm": Case("StableLmConfig", _EVEN | {"use_qkv_bias": True, "rope_parameters": _HALF}),
    "stablelm-12b": Case(
        "StableLmConfig", _EVEN | {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": _HALF}
    ),
    "olmo2": Case("Olmo2Config", _EVEN | {"rope_parameters": _LINEAR}),
    "olmo3": Case(
        "Olmo3Config",
        _EVEN
        | {
            "num_hidden_layers": 5,
            "sliding_window": 100,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _YARN,
            },
        },
    ),
    "granite": Case(
        "GraniteConfig",
        _EVEN
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "tie_word_embeddings": True,
            "mlp_bias": True,
        },
    ),
    "exaone4": Case(
        "Exaone4Config",
        _EVEN | {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": _LLAMA3},
    ),
    "exaone4-32b": Case(
        "Exaone4Config", _EVEN | {"num_hidden_layers": 64, "sliding_window": 100, "initializer_range": 0.05}
    ),
    "gpt2": Case("GPT2Config", _GPT | _GELU | {"activation_function": "gelu_new"}),
    "gpt2-narrow-untied": Case(
        "GPT2Config", _GPT | _GELU | {"n_inner": 100, "tie_word_embeddings": False}, after=lambda path: _beheaded(path)
    ),
    "neox": Case("GPTNeoXConfig", _UNSHARED | _GELU | {"rope_parameters": _HALF}),
    "neox-sequential": Case(
        "GPTNeoXConfig", _UNSHARED | _GELU | {"rope_parameters": _HALF, "use_parallel_residual": False}
    ),
    "bloom": Case(
        "BloomConfig",
        _COMMON | _GELU | {"hidden_size": 72, "n_layer": 3, "n_head": 6},
        after=lambda path: _beheaded(path),
    ),
    "falcon-7b": Case("FalconConfig", _FALCON, seed=1),
    "falcon-40b": Case("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Case(
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
        seed=1,
    ),
    "falcon-many-keys": Case("FalconConfig", _FALCON | {"multi_query": False}),
    "mpt": Case(
        "MptConfig",
        _COMMON
        | _GELU
        | {"d_model": 72, "n_heads": 6, "n_layers": 3, "max_seq_len": 640, "attn_config": {"clip_qkv": 0.5}},
    ),
    "starcoder2": Case("Starcoder2Config", _EVEN | {"sliding_window": 600}),
    "glm4": Case("Glm4Config", _USUAL),
    "command-r": Case("CohereConfig", _EVEN | {"logit_scale": 0.3}, seed=1),
    "command-r-plus": Case(
        "CohereConfig",
        _EVEN | {"num_hidden_layers": 64, "use_qk_norm": True, "logit_scale": 0.3, "initializer_range": 0.05},
    ),
    "command-r7b": Case(
        "Cohere2Config",
        _EVEN | {"head_dim": 12, "num_hidden_layers": 5, "sliding_window": 100, "logit_scale": 0.3},
    ),
    "deepseek-v2-lite": Case("DeepseekV2Config", _MLA | {"q_lora_rank": None, "num_hidden_layers": 26}),
    "deepseek-v2": Case("DeepseekV2Config", _MLA | {"q_lora_rank": 36, "rope_parameters": _DEEP_YARN}),
    "deepseek-v3": Case(
        "DeepseekV3Config",
        _MLA
        | {
            "q_lora_rank": 36,
            "rope_parameters": _DEEP_YARN,
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 12,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
        },
    ),
    "gpt-oss": Case(
        "GptOssConfig",
        _EVEN
        | _EXPERTS
        | {
            "head_dim": 20,
            "num_hidden_layers": 4,
            "sliding_window": 100,
            "rope_parameters": _YARN | {"truncate": True, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "llama4": Case("Llama4TextConfig", _LLAMA4),
    "lfm2": Case(
        "Lfm2Config",
        _EVEN
        | {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
            "intermediate_size": 300,
            "block_multiple_of": 8,
            "conv_L_cache": 3,
        },
    ),
    "minicpm": Case("GraniteConfig", _EVEN | _SCALES, after=lambda path: _as_minicpm(path)),
    "internlm2": Case("LlamaConfig", _EVEN, after=lambda path: _as_internlm2(path)),
    "baichuan": Case(
        "LlamaConfig",
        _UNSHARED | {"num_hidden_layers": 32, "hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3},
        after=lambda path: _as_baichuan(path),
    ),
    "baichuan-13b": Case(
        "LlamaConfig",
        _UNSHARED | {"num_hidden_layers": 40, "hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3},
        after=lambda path: _as_baichuan(path),
        alibi=True,
    ),
    # the text part of multimodal models
    "gemma3-seeing": Case(
        "Gemma3Config", {"text_config": _GEMMA3, "vision_config": _EYES, "mm_tokens_per_image": 4}, seed=1
    ),
    "llama4-seeing": Case("Llama4Config", {"text_config": _LLAMA4, "vision_config": _EYES}),
    # config.json as earlier versions wrote it, with fewer fields
    "neox-before": Case(
        "GPTNeoXConfig",
        _UNSHARED | _GELU | {"rope_parameters": _HALF},
        after=lambda path: _before(path, rotary_pct=0.5, rotary_emb_base=10000),
    ),
    "phi3-before": Case(
        "Phi3Config",
        _EVEN | {"rope_parameters": _LONG, "original_max_position_embeddings": 256},
        after=lambda path: _before(
            path,
            rope_theta=10000.0,
            partial_rotary_factor=0.67,
            original_max_position_embeddings=256,
            rope_scaling={
                "type": "longrope",
                "short_factor": _LONG["short_factor"],
                "long_factor": _LONG["long_factor"],
            },
        ),
    ),
    "gemma3-before": Case(
        "Gemma3TextConfig",
        _USUAL
        | _GELU
        | {
            "num_hidden_layers": 3,
            "sliding_window": 100,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
            },
        },
        seed=2,
        after=lambda path: _before(
            path,
            rope_theta=50000.0,
            rope_local_base_freq=1000.0,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            sliding_window_pattern=3,
            layer_types=None,
            tie_word_embeddings=None,
        ),
    ),
    "olmo3-before": Case(
        "Olmo3Config",
        _EVEN
        | {
            "num_hidden_layers": 5,
            "sliding_window": 100,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _YARN,
            },
        },
        after=lambda path: _before(
            path, rope_theta=10000.0, rope_scaling={key: _YARN[key] for key in _YARN if key != "rope_theta"}
        ),
    ),
    "falcon-before": Case(
        "FalconConfig",
        _FALCON,
        seed=1,
        after=lambda path: _before(
            path,
            architectures=["RWForCausalLM"],
            n_layer=3,
            n_head=6,
            num_hidden_layers=None,
            num_attention_heads=None,
            num_kv_heads=None,
            max_position_embeddings=None,
            tie_word_embeddings=None,
            ffn_hidden_size=None,
            activation=None,
        ),
    ),
}


def base(name: str, directory: Path, *, dtype: str = "float32", seed: int | None = None, **options: Any) -> Path:
    """Write the model of `CASES[name]` with a tokenizer, smaller than its vocabulary."""
    case = CASES[name]
    config = getattr(transformers, case.config)(**case.options | options)
    torch.manual_seed(case.seed if seed is None else seed)
    model = _auto(config).from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 1 or "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    if dtype != "float32":  # Llama 4 has complex buffers, which no dtype of weights suits
        model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    vocabularies.byte_level(directory)
    if case.after is not None:
        shutil.copytree(directory, _as_saved(directory))
        case.after(directory)
    return directory


def _auto(config: Any) -> Any:
    """The class that loads a model, multimodal or not."""
    seeing = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM


def _as_saved(directory: Path) -> Path:
    """The directory as transformers saved it, where `after` has rearranged the model."""
    return directory.with_name(directory.name + "-as-saved")


def ids(name: str) -> list[int]:
    """Return the tokens that are compared."""
    return tiny.random_ids(CASES[name].positions)


class _TableGelu(torch.nn.Module):  # type: ignore[misc]
    """GELU as in llama.cpp's CPU code: a table from 16-bit floats to 16-bit floats."""

    def forward(self, x: Any) -> Any:
        wide = x.half().float()
        found = torch.nn.functional.gelu(wide, approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


def reference(
    name: str, directory: Path, weights: Mapping[str, NDArray[Any]] | None = None, *, table_gelu: bool = False
) -> NDArray[np.float32]:
    """Return transformers' logits in f32; `weights` replace its own (padded at the ends of their rows).

    With `table_gelu` its activation is as coarse as llama.cpp's.
    """
    saved = _as_saved(directory) if _as_saved(directory).exists() else directory
    kind = _auto(transformers.AutoConfig.from_pretrained(saved))
    model = kind.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager")
    state = model.state_dict()
    for key, values in (weights or {}).items():
        state[key].copy_(torch.from_numpy(values[..., : state[key].shape[-1]].copy()))
    if table_gelu:
        for module in list(model.modules()):
            for child, activation in list(module.named_children()):
                if "gelu" in type(activation).__name__.lower():
                    setattr(module, child, _TableGelu())
    more = _alibi(model.config.num_attention_heads, len(ids(name))) if CASES[name].alibi else {}
    with torch.no_grad():
        found: NDArray[np.float32] = model.eval()(torch.tensor([ids(name)]), **more).logits[0].float().numpy()
    return found


def _alibi(heads: int, length: int) -> dict[str, Any]:
    """ALiBi (Press et al. 2022) as the mask of a model without effective RoPE: all positions are 0.

    Heads up to the largest power of two have slopes 2^(-8/n), 2^(-16/n), ...; those beyond lie in between.
    """
    power = 2 ** int(np.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    bias = torch.tensor(slopes)[:, None, None] * distance
    mask = bias.masked_fill(distance > 0, torch.finfo(torch.float32).min)
    return {"attention_mask": mask[None], "position_ids": torch.zeros(1, length, dtype=torch.long)}


@contextmanager
def _rewritten(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The config and the tensors of a model, to be changed."""
    path = directory / "model.safetensors"
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    yield config, tensors
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, path, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config), "utf-8")


def _fuse(directory: Path) -> None:
    """Store experts as transformers 5 does in memory: one tensor of all gates and ups, one of all downs."""
    with _rewritten(directory) as (_, tensors):
        found: dict[str, dict[tuple[int, str], Any]] = {}
        for key in list(tensors):
            if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", key):
                found.setdefault(match[1], {})[int(match[2]), match[3]] = tensors.pop(key)
        for name, parts in found.items():
            count = len(parts) // 3
            pairs = [np.concatenate([parts[n, "w1"], parts[n, "w3"]]) for n in range(count)]
            tensors[name + ".gate_up_proj"] = np.stack(pairs)
            tensors[name + ".down_proj"] = np.stack([parts[n, "w2"] for n in range(count)])


def _beheaded(directory: Path) -> None:
    """Name tensors as in checkpoints saved from the model without its head."""
    with _rewritten(directory) as (_, tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)


def _before(directory: Path, **words: Any) -> None:
    """The same config with an earlier version's field names; a name that is None is left out."""
    with _rewritten(directory) as (config, _):
        config.pop("rope_parameters", None)
        config.update(words)
        for key in [key for key, value in words.items() if value is None]:
            config.pop(key, None)


def _as_minicpm(directory: Path) -> None:
    """The same model with MiniCPM's names."""
    with _rewritten(directory) as (config, _):
        config.update(architectures=["MiniCPMForCausalLM"], model_type="minicpm")
        config["scale_emb"] = config.pop("embedding_multiplier")
        config["scale_depth"] = config.pop("residual_multiplier") * config["num_hidden_layers"] ** 0.5
        config["dim_model_base"] = config["hidden_size"] / config.pop("logits_scaling")
        del config["attention_multiplier"]


def _as_internlm2(directory: Path) -> None:
    """The same model with InternLM2's names."""
    with _rewritten(directory) as (config, tensors):
        config.update(architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=False)
        width = config["hidden_size"] // config["num_attention_heads"]
        words = {
            "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        }  # fmt: skip
        for key in list(tensors):
            renamed = key
            for old, new in words.items():
                renamed = renamed.replace(old, new)
            tensors[renamed] = tensors.pop(key)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            parts = [
                tensors.pop(name + f"self_attn.{part}_proj.weight").reshape(
                    config["num_key_value_heads"], -1, width, config["hidden_size"]
                )
                for part in "qkv"
            ]
            fused = np.concatenate(parts, axis=1)
            tensors[name + "attention.wqkv.weight"] = fused.reshape(-1, config["hidden_size"])


def _as_baichuan(directory: Path) -> None:
    """The same model with Baichuan's names."""
    with _rewritten(directory) as (config, tensors):
        config.update(architectures=["BaichuanForCausalLM"], model_type="baichuan")
        config["model_max_length"] = config.pop("max_position_embeddings")
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}.self_attn."
            parts = [tensors.pop(name + f"{part}_proj.weight") for part in "qkv"]
            tensors[name + "W_pack.weight"] = np.concatenate(parts)
