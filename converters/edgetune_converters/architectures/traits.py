"""How each family computes, row by row, as far as it is not as in Llama. A family without a row has no description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Number, Traits


def _stated(field: str) -> Number:
    return lambda config: config.number(field)


def _cap(field: str) -> Number:
    return lambda config: 0.0 if config.get(field) is None else config.number(field)


def _window(config: ModelConfig) -> int | None:
    found = config.get("sliding_window")
    return found if isinstance(found, int) and config.get("use_sliding_window", True) else None


def _every_layer(config: ModelConfig, layer: int) -> int | None:
    """A window in all layers, as in Mistral and Phi-3; in those that `layer_types` names where it is said."""
    return _window(config) if config.get("layer_types") is None or config.slides(layer) else None


def _later_layers(config: ModelConfig, layer: int) -> int | None:
    """Qwen's way: by `layer_types`, or from layer `max_window_layers` on, and only if `use_sliding_window`."""
    if not config.get("use_sliding_window", False):
        return None
    kinds = config.get("layer_types")
    slides = config.slides(layer) if kinds else layer >= config.get("max_window_layers", config.layers)
    return _window(config) if slides else None


def _some_layers(config: ModelConfig, layer: int) -> int | None:
    """By `layer_types`, or all but the last of each period."""
    return _window(config) if config.slides(layer) else None


def _local_in_window(config: ModelConfig, layer: int) -> str:
    return "local" if config.slides(layer) else "global"


def _some_rotated(config: ModelConfig, layer: int) -> str | None:
    """SmolLM3 leaves every fourth layer as it is."""
    stated = config.get("no_rope_layers")
    rotated = stated[layer] if stated else (layer + 1) % config.get("no_rope_layer_interval", 4)
    return "global" if rotated else None


def _in_window_or_all(config: ModelConfig, layer: int) -> str | None:
    """EXAONE 4 rotates the layers with a window alone, where there are such."""
    return "global" if _window(config) is None or config.slides(layer) else None


def _unrotated(config: ModelConfig) -> str | None:
    """Baichuan's 13 B has ALiBi, which ONNX Runtime's attention has not."""
    return None if config.layers == 32 else f"{config.layers} layers: only the 7 B of Baichuan can be written as ONNX"


def _scalar(config: ModelConfig) -> float:
    return float(config.number("query_pre_attn_scalar", 256) ** -0.5)


def _root_of_width(config: ModelConfig) -> float:
    return float(config.hidden**0.5)


def _activation(default: str) -> Callable[[ModelConfig], Any]:
    return lambda config: config.get("hidden_act", default)


def _parallel(default: bool) -> Callable[[ModelConfig], bool]:
    return lambda config: bool(config.get("use_parallel_residual", default))


_GEMMA = Traits(
    activation=lambda config: config.get("hidden_activation") or "gelu_pytorch_tanh",
    embedding_scale=_root_of_width,
)
_COMMAND = Traits(norm="layer", interleaved=True, parallel=lambda config: True, logit_scale=_stated("logit_scale"))
_GRANITE = Traits(
    attention_scale=_stated("attention_multiplier"),
    embedding_scale=_stated("embedding_multiplier"),
    residual_scale=_stated("residual_multiplier"),
    logit_scale=lambda config: 1 / config.number("logits_scaling"),
)

# name of the family -> its traits
TRAITS: Mapping[str, Traits] = {
    "Llama": Traits(),
    "Mistral": Traits(window=_every_layer),
    "Qwen2": Traits(window=_later_layers),
    "Qwen3": Traits(window=_later_layers),
    "Phi-3 and Phi-4": Traits(window=_every_layer),
    "SmolLM3": Traits(window=_later_layers, rotation=_some_rotated),
    "Granite": _GRANITE,
    "OLMo 2": Traits(),
    "Gemma": _GEMMA,
    "Gemma 2": replace(
        _GEMMA,
        attention_scale=_scalar,
        attention_cap=_cap("attn_logit_softcapping"),
        logit_cap=_cap("final_logit_softcapping"),
        window=_some_layers,
    ),
    "Gemma 3 (text)": replace(
        _GEMMA,
        attention_scale=_scalar,
        logit_cap=_cap("final_logit_softcapping"),
        window=_some_layers,
        rotation=_local_in_window,
    ),
    "StableLM 2": Traits(norm="layer", parallel=_parallel(False)),
    "Phi-2": Traits(
        norm="layer", activation=lambda config: config.get("hidden_act", "gelu_new"), parallel=lambda c: True
    ),
    "GPT-2": Traits(
        norm="layer",
        activation=lambda config: config.get("hidden_act", "gelu_new"),
        rotation=lambda config, layer: None,
    ),
    "GPT-NeoX and Pythia": Traits(
        norm="layer", activation=lambda config: config.get("hidden_act", "gelu"), parallel=_parallel(True)
    ),
    "Mixtral": Traits(window=_every_layer),
    "Qwen2-MoE": Traits(
        window=_later_layers, normalized_experts=lambda config: bool(config.get("norm_topk_prob", False))
    ),
    "Qwen3-MoE": Traits(
        window=_later_layers, normalized_experts=lambda config: bool(config.get("norm_topk_prob", False))
    ),
    "Granite-MoE": _GRANITE,
    "OLMo 3": Traits(window=_some_layers, rotation=_local_in_window),
    "EXAONE 4": Traits(window=_some_layers, rotation=_in_window_or_all),
    "StarCoder 2": Traits(norm="layer", activation=_activation("gelu_pytorch_tanh"), window=_every_layer),
    "GLM-4": Traits(interleaved=True),
    "Command-R": Traits(
        norm="layer", interleaved=True, parallel=lambda config: True, logit_scale=_stated("logit_scale")
    ),
    "Command-R7B": Traits(
        norm="layer",
        interleaved=True,
        parallel=lambda config: True,
        logit_scale=_stated("logit_scale"),
        window=_some_layers,
        rotation=lambda config, layer: "global" if config.slides(layer) else None,
    ),
    "MiniCPM": Traits(
        embedding_scale=_stated("scale_emb"),
        residual_scale=lambda config: config.number("scale_depth") / config.layers**0.5,
        logit_scale=lambda config: config.number("dim_model_base") / config.hidden,
    ),
    "InternLM2": Traits(),
    "Baichuan": Traits(refusal=_unrotated),
}
