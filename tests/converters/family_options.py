"""Options tried on every family, in addition to its own cases: tied and untied heads, biases, RoPE types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from edgetune_converters.architectures import ModelConfig, family_of
from tests.converters import family_models, tiny

# a case for each family, on which the options are tried
CASES: dict[str, str] = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "SmolLM3": "smollm3",
    "StableLM 2": "stablelm", "OLMo 2": "olmo2", "OLMo 3": "olmo3", "Granite": "granite", "EXAONE 4": "exaone4",
    "Gemma": "gemma", "Gemma 2": "gemma2", "Gemma 3 (text)": "gemma3", "Phi-3 and Phi-4": "phi3", "Phi-2": "phi2",
    "Mixtral": "mixtral", "Qwen2-MoE": "qwen2moe", "Qwen3-MoE": "qwen3moe", "Granite-MoE": "granitemoe",
    "DeepSeek-V2": "deepseek-v2", "DeepSeek-V3": "deepseek-v3", "gpt-oss": "gpt-oss", "Llama 4 (text)": "llama4",
    "GPT-2": "gpt2", "GPT-NeoX and Pythia": "neox", "BLOOM": "bloom", "Falcon": "falcon-40b", "MPT": "mpt",
    "StarCoder 2": "starcoder2", "GLM-4": "glm4", "Command-R": "command-r", "Command-R7B": "command-r7b",
    "LFM2": "lfm2", "MiniCPM": "minicpm", "InternLM2": "internlm2", "Baichuan": "baichuan",
}  # fmt: skip
WITHOUT_ROPE = ("GPT-2", "BLOOM", "MPT")
ROPES = ("linear", "yarn", "llama3", "longrope")
OPTIONS = ("tied", "untied", "biases", *ROPES)

_ORIGINAL = {"original_max_position_embeddings": 160}
_SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "yarn": {"factor": 4.0, **_ORIGINAL},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
}
# seeds where two tokens of a random model tie to six digits
SEEDS = {("Gemma 3 (text)", "untied"): 2, ("GPT-2", "untied"): 1, ("MPT", "untied"): 1, ("StarCoder 2", "linear"): 1}

_OWN_ROPE = "the configuration of Phi-3 takes longrope alone"
_NO_BIASES = "its attention has no biases"
# models that transformers does not have, with the reason; every other failure to build one is a fault of the settings
ABSENT: dict[tuple[str, str], str] = {
    **{("Phi-3 and Phi-4", option): _OWN_ROPE for option in ("linear", "yarn", "llama3")},
    **{(family, "biases"): _NO_BIASES for family in (
        "Mistral", "EXAONE 4", "Phi-3 and Phi-4", "Mixtral", "Falcon", "MPT", "LFM2"
    )},
}  # fmt: skip


def tried() -> Iterator[tuple[str, str]]:
    """Yield family and option, wherever the option has a meaning."""
    for family in CASES:
        yield from ((family, option) for option in OPTIONS if option not in ROPES or family not in WITHOUT_ROPE)


def settings(family: str, option: str) -> dict[str, Any]:
    """Return the changes of the config of the family's case."""
    if option in ("tied", "untied"):
        return {"tie_word_embeddings": option == "tied"}
    if option == "biases":
        return {"attention_bias": True}
    case = family_models.CASES[CASES[family]]
    config = getattr(tiny.transformers, case.config)(**case.options)
    config = getattr(config, "text_config", config)
    before = {"rope_theta": 10000.0} | (config.to_dict().get("rope_parameters") or {})
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    layered = {key: value for key, value in before.items() if key in ("sliding_attention", "full_attention")}
    scaled = {"rope_type": option, **(_SCALED.get(option) or _longrope(config, kept))}
    if layered:  # only the layers with full attention are scaled
        return {"rope_parameters": layered | {"full_attention": {"rope_theta": 10000.0, **scaled}}}
    return {"rope_parameters": kept | scaled}


def _longrope(config: Any, kept: dict[str, Any]) -> dict[str, Any]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(width * kept.get("partial_rotary_factor", 1.0)) // 2
    return {
        "short_factor": [1 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.7 * pair for pair in range(pairs)],
        **_ORIGINAL,
    }


def family_name(directory: Path) -> str:
    """The family of a model directory."""
    return family_of(ModelConfig(json.loads((directory / "config.json").read_text("utf-8")))).name


def has_biases(directory: Path) -> bool:
    """Whether the attention of a checkpoint has biases."""
    with safe_open(directory / "model.safetensors", "np") as file:
        return any(re.search(r"(attn|attention)\.\w+\.bias$", name) for name in file.keys())  # noqa: SIM118 (no mapping)
