"""4-bit floats (E2M1) in blocks with a scale each: MXFP4 of gpt-oss and of compressed-tensors, NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgetune_converters.reading.prequantized.decoder import ConfigJson, ViewTensor, WeightError, check_matrix
from edgetune_converters.tensors import F32, FLOAT8, TensorInfo

BLOCKS = "_blocks"
"""The end of the names of gpt-oss's experts in 4 bits."""
_WEIGHTS_OF_A_BLOCK = 32
# the values of E2M1, by code; a byte holds two codes, the first in its low half
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
# E8M0: powers of two with a bias of 127; the last code is NaN
POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)


def scales_of(name: str) -> str:
    return name.removesuffix(BLOCKS) + "_scales"


class Mxfp4Weight:
    """The matrices of all experts in blocks of 32 four-bit floats with one power of two each (OCP MX, 2023)."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        info, scales = tensors[name], tensors[scales_of(name)]
        if info.dtype != "U8" or len(info.shape) != 4 or info.shape[-1] * 2 != _WEIGHTS_OF_A_BLOCK:
            raise WeightError(f"{name} is {info.dtype} {list(info.shape)}, not blocks of 16 bytes")
        if scales.dtype != "U8" or scales.shape != info.shape[:-1]:
            raise WeightError(
                f"{scales.name} is {scales.dtype} {list(scales.shape)}, not a byte for each block of {name}"
            )
        experts, rows, blocks, _ = info.shape
        self._codes = view(info).reshape(experts * rows, -1)
        self._scales = view(scales).reshape(experts * rows, blocks)
        self.parts: tuple[str, ...] = (name, scales.name)
        shape = (experts, rows, blocks * _WEIGHTS_OF_A_BLOCK)
        self.info = replace(info, shape=shape, dtype="MXFP4", bytes=info.bytes + scales.bytes)

    def rows(self, first: int, last: int) -> F32:
        """Return rows first..last in f32, exact; a NaN scale makes its block NaN."""
        scales = self._scales[first:last]
        codes = self._codes[first:last].reshape(*scales.shape, -1)
        decoded: F32 = _PAIRS[codes].reshape(*scales.shape, _WEIGHTS_OF_A_BLOCK) * POWERS[scales][..., None]
        return decoded.reshape(last - first, -1)


class PackedFloat4:
    """NVFP4 (blocks of 16, E4M3 scales) and MXFP4 (blocks of 32, powers of two) of compressed-tensors and ModelOpt.

    NVFP4 has a second scale for the whole weight: the divisor `weight_global_scale`, or ModelOpt's factor
    `weight_scale_2`.
    """

    def __init__(self, module: str, name: str, tensors: Mapping[str, TensorInfo], view: ViewTensor) -> None:
        packed, scale = tensors[name], tensors.get(f"{module}.weight_scale")
        if scale is None:
            raise WeightError(f"{name} is stored in 4-bit floats, but {module}.weight_scale is missing")
        check_matrix(packed, ("U8",))
        rows, columns = packed.shape[0], packed.shape[1] * 2
        kind = _KINDS.get(scale.dtype)
        if kind is None:
            raise WeightError(f"{scale.name} is {scale.dtype}; {' or '.join(_KINDS)} are read beside 4-bit floats")
        self._table, self._size, label = kind
        check_matrix(scale, (scale.dtype,), (rows, columns // self._size))
        whole = [info for ending in _WHOLE if (info := tensors.get(f"{module}.{ending}")) is not None]
        if (label == "NVFP4") != (len(whole) == 1):
            raise WeightError(
                f"{module} has {len(whole)} scales for the whole weight ({' or '.join(_WHOLE)}) in {label}"
            )
        self._divisor, self._factor = np.float32(1), np.float32(1)
        for info in whole:
            check_matrix(info, ("F32",), (1,) if info.shape else ())
            value = np.float32(view(info).reshape(-1)[0])
            if not np.isfinite(value) or value <= 0:
                raise WeightError(f"{info.name} is {value}")
            if info.name.endswith(_WHOLE[0]):
                self._divisor = value
            else:
                self._factor = value
        self._codes, self._scales = view(packed), view(scale)
        unused = [tensors[part] for ending in UNUSED_SCALES if (part := f"{module}.{ending}") in tensors]
        found = [packed, scale, *whole, *unused]
        self.parts: tuple[str, ...] = tuple(info.name for info in found)
        total = sum(info.bytes for info in found)
        self.info = replace(packed, name=f"{module}.weight", shape=(rows, columns), dtype=label, bytes=total)

    def rows(self, first: int, last: int) -> F32:
        """Return rows first..last in f32: the product of the value with the quotient of the scales."""
        scales = self._table[self._scales[first:last]] / self._divisor * self._factor
        decoded: F32 = _PAIRS[self._codes[first:last]].reshape(*scales.shape, self._size) * scales[..., None]
        return decoded.reshape(last - first, -1)


_WHOLE = ("weight_global_scale", "weight_scale_2")
UNUSED_SCALES = ("input_scale", "input_global_scale", "k_scale", "v_scale")
"""Scales of activations, which may accompany a weight and do not affect it."""
# dtype of the scales -> their values by code, weights of a block, label
_KINDS: Mapping[str, tuple[F32, int, str]] = {
    "F8_E4M3": (FLOAT8["F8_E4M3"], 16, "NVFP4"),
    "U8": (POWERS, _WEIGHTS_OF_A_BLOCK, "MXFP4"),
    "F8_E8M0": (POWERS, _WEIGHTS_OF_A_BLOCK, "MXFP4"),
}


def modelopt_weight(name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> PackedFloat4:
    """Return the decoder of an NVFP4 weight of ModelOpt, which keeps the name `weight`."""
    return PackedFloat4(name.removesuffix(".weight"), name, tensors, view)
