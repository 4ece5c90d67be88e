"""Rotary position embedding: which scaling a GGUF can carry, in metadata or as a tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.gguf.values import Value, f32, string, u32

Rows = tuple[tuple[str, Callable[[ModelConfig], Value | None]], ...]


def llama3_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Llama 3.1's scaling as divisors of the head_dim/2 frequencies, f32 [head_dim/2]; None for another rope type.

    Long wavelengths are stretched by `factor`, short ones kept, and those between are blended (transformers,
    `_compute_llama3_parameters`).
    """
    rope = config.rope
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(rope, "original_max_position_embeddings")
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelength = 2 * np.pi * float(rope["rope_theta"]) ** exponents
    blend = (original / wavelength - low) / (high - low)
    factors = 1 / ((1 - blend) / factor + blend)
    factors[wavelength > original / low] = factor
    factors[wavelength < original / high] = 1
    return factors.astype(np.float32)


def yarn_attention(config: ModelConfig) -> Value | None:
    """llama.cpp multiplies YaRN's usual 1 + 0.1 ln(factor) itself: only a deviation from it is stored."""
    rope = config.rope
    if rope["rope_type"] != "yarn" or rope.get("attention_factor") is None:
        return None
    return f32(_number(rope, "attention_factor") / (1 + 0.1 * math.log(_number(rope, "factor"))))


def _number(rope: Mapping[str, Any], key: str) -> float:
    value: Any = rope.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise ArchitectureError(f"config.json: rope {key} must be a positive number, not {value!r}")
    return float(value)


def _when(kinds: tuple[str, ...], key: str, make: Callable[[Any], Value]) -> Callable[[ModelConfig], Value | None]:
    """A rope parameter that is stored when the type is one of `kinds`, and where the config has it."""

    def value(config: ModelConfig) -> Value | None:
        found = config.rope.get(key) if config.rope["rope_type"] in kinds else None
        return None if found is None else make(found)

    return value


METADATA: Rows = (
    ("rope.freq_base", lambda config: f32(_number(config.rope, "rope_theta"))),
    ("rope.dimension_count", lambda config: u32(config.head_dim)),
    ("rope.scaling.type", _when(("linear", "yarn"), "rope_type", string)),
    ("rope.scaling.factor", _when(("linear", "yarn"), "factor", f32)),
    ("rope.scaling.original_context_length", _when(("yarn",), "original_max_position_embeddings", u32)),
    ("rope.scaling.yarn_beta_fast", _when(("yarn",), "beta_fast", f32)),
    ("rope.scaling.yarn_beta_slow", _when(("yarn",), "beta_slow", f32)),
    ("rope.scaling.attn_factor", yarn_attention),
)


def supported(*kinds: str) -> Callable[[ModelConfig], str | None]:
    """A requirement: the rope type is one that this family's GGUF form can carry, over the whole head."""

    def check(config: ModelConfig) -> str | None:
        kind, share = config.rope["rope_type"], config.rope.get("partial_rotary_factor", 1.0)
        if kind not in kinds:
            return f"rope type {kind!r}: only {', '.join(kinds)} can be carried"
        if share not in (None, 1, 1.0):
            return f"partial_rotary_factor {share}: only whole heads are rotated in this family"
        return None

    return check
