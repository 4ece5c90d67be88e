"""RoPE scaling in GGUF: as metadata or as a tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures import slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.table import GeneratedTensor, MetadataRow, Requirement
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.gguf.values import Value, f32, string, u32


def llama3_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Return Llama 3.1's scaling as divisors of the frequencies, f32 [rope_dim/2]; None for another rope type.

    Long wavelengths are stretched by `factor`, short ones kept, those between blended (transformers,
    `_compute_llama3_parameters`). Every step rounds to f32 as torch does, which divides a number by a tensor by
    multiplying with the reciprocal; the bits are those of convert_hf_to_gguf.py.
    """
    rope = config.rope
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original, one = _number(rope, "original_max_position_embeddings"), np.float32(1)
    exponents = np.arange(0, config.rope_dim, 2, dtype=np.float32) / np.float32(config.rope_dim)
    frequencies = one / (_number(rope, "rope_theta") ** exponents.astype(np.float64)).astype(np.float32)
    wavelength = one / frequencies * np.float32(2 * math.pi)
    factors = np.where(wavelength > original / low, np.float32(factor), one)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    if high != low:
        blend = (one / wavelength[between] * np.float32(original) - np.float32(low)) / np.float32(high - low)
        factors[between] = one / ((one - blend) / np.float32(factor) + blend)
    return factors


def _long_factors(name: str) -> Callable[[ModelConfig], NDArray[np.float32] | None]:
    """One of LongRoPE's two lists of divisors: `short_factor` up to the original context, `long_factor` beyond."""

    def factors(config: ModelConfig) -> NDArray[np.float32] | None:
        if config.rope["rope_type"] not in LONGROPE:
            return None
        found = config.rope.get(name)
        if not isinstance(found, list) or len(found) != config.rope_dim // 2:
            raise ArchitectureError(f"config.json: rope {name} must be a list of {config.rope_dim // 2} numbers")
        return np.array([_number({name: number}, name) for number in found], np.float32)

    return factors


def attention_factor(config: ModelConfig) -> Value | None:
    """Return the factor of query and key beyond the one that llama.cpp applies by itself."""
    make = _ATTENTION.get(config.rope["rope_type"])
    return None if make is None else make(config)


def _yarn_attention(config: ModelConfig) -> Value | None:
    """llama.cpp applies YaRN's usual 1 + 0.1 ln(factor) itself; only a deviation from it is stored."""
    rope = config.rope
    log = math.log(_number(rope, "factor"))
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if rope.get("attention_factor") is not None:
        return f32(_number(rope, "attention_factor") / (1 + 0.1 * log))
    if not all(scales):
        return None
    one, other = (1 + 0.1 * _number(rope, key) * log for key in ("mscale", "mscale_all_dim"))
    return f32(one / other / (1 + 0.1 * log))


def _long_attention(config: ModelConfig) -> Value | None:
    """LongRoPE's factor follows from the ratio of the contexts."""
    rope, original = config.rope, _number(config.rope, "original_max_position_embeddings")
    stated = rope.get("attention_factor")
    if stated is not None:
        return f32(_number(rope, "attention_factor"))
    stretch = rope.get("factor") or config.integer("max_position_embeddings") / original
    return f32(math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0)


def _number(rope: Mapping[str, Any], key: str) -> float:
    value: Any = rope.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise ArchitectureError(f"config.json: rope {key} must be a positive number, not {value!r}")
    return float(value)


def _when(kinds: tuple[str, ...], key: str, make: Callable[[Any], Value]) -> Callable[[ModelConfig], Value | None]:
    """A rope parameter that is stored for the types `kinds`, where the config has it."""

    def value(config: ModelConfig) -> Value | None:
        found = config.rope.get(key) if config.rope["rope_type"] in kinds else None
        return None if found is None else make(found)

    return value


LONGROPE = ("longrope", "su")
_ATTENTION = {"yarn": _yarn_attention, "longrope": _long_attention, "su": _long_attention}


def _kind(config: ModelConfig) -> Value | None:
    names = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
    name = names.get(config.rope["rope_type"])
    return None if name is None else string(name)


METADATA: tuple[MetadataRow, ...] = (
    ("rope.freq_base", lambda config: f32(_number(config.rope, "rope_theta"))),
    ("rope.dimension_count", lambda config: u32(config.rope_dim)),
    ("rope.scaling.type", _kind),
    ("rope.scaling.factor", _when(("linear", "yarn"), "factor", f32)),
    (
        "rope.scaling.original_context_length",
        _when(("yarn", *LONGROPE), "original_max_position_embeddings", u32),
    ),
    ("rope.scaling.yarn_beta_fast", _when(("yarn",), "beta_fast", f32)),
    ("rope.scaling.yarn_beta_slow", _when(("yarn",), "beta_slow", f32)),
    ("rope.scaling.attn_factor", attention_factor),
)
LOCAL_METADATA: tuple[MetadataRow, ...] = (
    ("rope.freq_base_swa", lambda config: f32(_number(config.local_rope, "rope_theta"))),
)

LLAMA3_FACTORS = GeneratedTensor(slots.ROPE_FACTORS, llama3_factors)
LONG_FACTORS = (
    GeneratedTensor(slots.ROPE_FACTORS_LONG, _long_factors("long_factor")),
    GeneratedTensor(slots.ROPE_FACTORS_SHORT, _long_factors("short_factor")),
)


def supported(*kinds: str, partial: bool = False, untruncated: bool = False) -> Requirement:
    """Require a rope type that this GGUF architecture can represent.

    `partial` allows rotating a part of the head, `untruncated` a YaRN that does not round its blended range. Dynamic
    scaling is like none up to max_position_embeddings, where exported files end.
    """

    def check(config: ModelConfig) -> str | None:
        kind = config.rope["rope_type"]
        if kind not in (*kinds, "dynamic"):
            return f"rope type {kind!r}: only {', '.join(kinds)} can be exported"
        if kind in ("linear", "yarn") and config.rope.get("factor") is None:
            return f"rope type {kind!r} without a factor"
        if kind == "yarn" and config.rope.get("truncate") is False and not untruncated:
            return "rope truncate False: llama.cpp rounds the range of frequencies that YaRN blends"
        if config.rope_dim % 2:
            return f"{config.rope_dim} rotated dimensions: they come in pairs"
        if config.rope_dim != config.head_dim and not partial:
            share = config.rope_dim / config.head_dim
            return f"partial_rotary_factor {share:g}: only whole heads are rotated in this family"
        return None

    return check


def context_notes(config: ModelConfig) -> list[str]:
    """Return what is to be known of the context that a file states, where RoPE is scaled."""
    rope, context, stated = config.rope, config.context, config.integer("max_position_embeddings")
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "dynamic":
        return [f"dynamic RoPE scaling begins past {stated} tokens: the file is right up to there, and has none beyond"]
    if context > stated:
        original = rope["original_max_position_embeddings"]
        return [
            f"the context is {context} tokens, {factor:g} times the original {original} of the {kind} scaling "
            f"(max_position_embeddings is {stated})"
        ]
    layered = any(config.slides(layer) for layer in range(config.layers))
    scales = kind in ("yarn", "linear") and isinstance(factor, (int, float)) and factor > 1
    if not scales or rope["original_max_position_embeddings"] or layered:
        return []
    return [
        f"the context is {stated} tokens, as max_position_embeddings states; if that is the length before {kind} "
        f'scaling by {factor:g}, add "original_max_position_embeddings": {stated} to the scaling in config.json'
    ]


def local_unscaled(config: ModelConfig) -> str | None:
    """Require unscaled RoPE in layers with a window; llama.cpp scales only the others."""
    kind = config.local_rope["rope_type"]
    return None if kind == "default" else f"rope type {kind!r} in the layers with a sliding window"


def one_theta(config: ModelConfig) -> str | None:
    """Require one base frequency for all layers; llama.cpp has only one for this family."""
    one, other = config.rope["rope_theta"], config.local_rope["rope_theta"]
    return None if one == other else f"rope_theta {other} in the layers with a sliding window and {one} in the others"
