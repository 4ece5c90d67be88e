"""RoPE as numbers: the frequencies of each rope type, and tables of cosines and sines.

The formulas are those of transformers (`modeling_rope_utils.py`), evaluated in f32 as there: distant positions are
rotated exactly as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune_converters.errors import ArchitectureError
from edgetune_converters.tensors import F32

_F1 = np.float32(1)


@dataclass(frozen=True)
class Rotation:
    """The rotation of one kind of layer.

    `frequencies`, f32 [dim/2], are radians per position; `scale` multiplies cosines and sines. `long`, where given,
    replaces `frequencies` for sequences longer than `original` positions (LongRoPE).
    """

    frequencies: F32
    scale: float = 1.0
    long: F32 | None = None
    original: int = 0

    @property
    def dim(self) -> int:
        """The number of rotated dimensions per head."""
        return 2 * len(self.frequencies)

    def rows(self, positions: int) -> int:
        """Return the rows of the tables for this many positions; those of `long` follow the first `original` ones."""
        return positions if self.long is None else self.original + positions

    def tables(self, first: int, last: int) -> tuple[F32, F32]:
        """Return rows first..last of the cosines and the sines, each f32 [last - first, dim/2]."""
        row = np.arange(first, last)
        if self.long is None:
            angles = np.outer(row.astype(np.float32), self.frequencies)
        else:
            beyond = (row >= self.original)[:, None]
            position = np.where(beyond, row[:, None] - self.original, row[:, None]).astype(np.float32)
            angles = position * np.where(beyond, self.long, self.frequencies)
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale


def rotation(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    """Return the rotation of config.json; `context` is max_position_embeddings.

    Raises ArchitectureError for an unknown rope type or a missing parameter.
    """
    kind = parameters.get("rope_type", "default")
    make = _KINDS.get(kind)
    if make is None:
        raise ArchitectureError(f"rope type {kind!r}: only {', '.join(_KINDS)} can be written as ONNX")
    return make(parameters, dim, context)


def _plain(parameters: Mapping[str, Any], dim: int) -> F32:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths: F32 = np.float32(_number(parameters, "rope_theta")) ** exponents
    return wavelengths


def _default(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    return Rotation(_F1 / _plain(parameters, dim))


def _linear(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    return Rotation(_F1 / _plain(parameters, dim) / np.float32(_number(parameters, "factor")))


def _llama3(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    factor, low, high = (_number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters.get("original_max_position_embeddings") or context
    plain = _F1 / _plain(parameters, dim)
    wavelength = np.float32(2 * math.pi) / plain
    stretched = plain / np.float32(factor)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (_F1 - smooth) * stretched + smooth * plain
    is_long, is_short = wavelength > original / low, wavelength < original / high
    return Rotation(np.where(is_long, stretched, np.where(is_short, plain, blended)).astype(np.float32))


def _yarn(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    original = _number({"original": parameters.get("original_max_position_embeddings") or context}, "original")
    stated = parameters.get("factor")
    factor = context / original if stated is None else _number(parameters, "factor")
    wavelengths = _plain(parameters, dim)
    low, high = _yarn_range(parameters, dim, original)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = _F1 - np.clip(ramp, 0, 1).astype(np.float32)
    frequencies = (_F1 / (np.float32(factor) * wavelengths)) * (_F1 - kept) + (_F1 / wavelengths) * kept
    return Rotation(frequencies, _yarn_scale(parameters, factor))


def _yarn_range(parameters: Mapping[str, Any], dim: int, original: float) -> tuple[float, float]:
    """The range of the dim/2 frequencies that YaRN blends."""
    theta = _number(parameters, "rope_theta")

    def place(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (place(parameters.get(key) or usual) for key, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    def scale(share: float = 1.0) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(one) / scale(other) if one and other else scale()


def _longrope(parameters: Mapping[str, Any], dim: int, context: int) -> Rotation:
    original = int(_number(parameters, "original_max_position_embeddings"))
    wavelengths = _plain(parameters, dim)
    short, long = (_F1 / (_list(parameters, key, dim // 2) * wavelengths) for key in ("short_factor", "long_factor"))
    return Rotation(short, _longrope_scale(parameters, original, context), long, original)


def _longrope_scale(parameters: Mapping[str, Any], original: int, context: int) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    factor = parameters.get("factor") or context / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _number(parameters: Mapping[str, Any], key: str) -> float:
    value: Any = parameters.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise ArchitectureError(f"config.json: rope {key} must be a positive number, not {value!r}")
    return float(value)


def _list(parameters: Mapping[str, Any], key: str, count: int) -> F32:
    found: Any = parameters.get(key)
    if not isinstance(found, list) or len(found) != count:
        raise ArchitectureError(f"config.json: rope {key} must be a list of {count} numbers")
    return np.array([_number({key: number}, key) for number in found], np.float32)


_KINDS: Mapping[str, Callable[[Mapping[str, Any], int, int], Rotation]] = {
    "default": _default,
    "dynamic": _default,  # up to max_position_embeddings, where the tables end
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
