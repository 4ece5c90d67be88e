"""bitsandbytes' 4-bit and 8-bit layers, bit for bit as bitsandbytes decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

import edgetune_native
from edgetune_converters.reading.prequantized.decoder import ConfigJson, ViewTensor, WeightError, is_or_are
from edgetune_converters.tensors import F32, TensorInfo


class FourBitWeight:
    """A weight of bitsandbytes' Linear4bit, decoded to its original dtype."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        own = [part for part in tensors if part.startswith(name + ".")]
        missing = [part for part in ("absmax", "quant_map") if f"{name}.{part}" not in tensors]
        missing += ["quant_state"] if not any(state in tensors for state in state_names(name)) else []
        if missing:
            raise WeightError(
                f"{name} is stored in 4 bits, but its {' and '.join(missing)} {is_or_are(missing)} missing"
            )
        weight = edgetune_native.saved_4bit(name, {part: view(tensors[part]) for part in [name, *own]})
        if len(weight.shape) != 2:
            raise WeightError(f"{name} has the shape {list(weight.shape)} in its quant_state; matrices are read")
        self._weight = weight._replace(packed=np.frombuffer(weight.packed, np.uint8), absmax=weight.absmax.reshape(-1))
        self.parts: tuple[str, ...] = (name, *own)
        total = sum(tensors[part].bytes for part in self.parts)
        label = weight.quant_type.upper()
        self.info = replace(tensors[name], shape=weight.shape, dtype=label, bytes=total)
        self.rows(0, 0)  # checks all sizes

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32."""
        decoded: F32 = edgetune_native.dequantize_4bit(
            self._weight.packed,
            self._weight.absmax,
            self._weight.shape,
            quant_type=self._weight.quant_type,
            blocksize=self._weight.blocksize,
            nested=self._weight.nested,
            quant_map=self._weight.quant_map,
            dtype=self._weight.dtype,
            rows=(first, last),
        )
        return decoded


class Int8Weight:
    """A weight of bitsandbytes' Linear8bitLt: integers, and the largest weight of each row."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        module = name.removesuffix(".weight")
        info = tensors[name]
        scb, layout = tensors.get(f"{module}.SCB"), tensors.get(f"{module}.weight_format")
        if scb is None:
            raise WeightError(f"{name} is stored in 8 bits, but {module}.SCB, the scales of its rows, is missing")
        if info.dtype != "I8" or len(info.shape) != 2:
            raise WeightError(f"{name} is {info.dtype} {list(info.shape)}, not a matrix of 8-bit integers")
        if scb.dtype != "F32" or scb.shape not in ((info.shape[0],), (info.shape[0], 1)):
            raise WeightError(
                f"{scb.name} is {scb.dtype} {list(scb.shape)}, not a float for each row of {list(info.shape)}"
            )
        if layout is not None and view(layout).any():
            raise WeightError(f"{name} is stored in a layout of some GPU ({layout.name} is not 0)")
        self._codes = view(info).reshape(info.shape)
        self._scb = np.ascontiguousarray(view(scb).reshape(-1))
        self.parts: tuple[str, ...] = (name, scb.name) if layout is None else (name, scb.name, layout.name)
        self.info = replace(info, dtype="INT8", bytes=sum(tensors[part].bytes for part in self.parts))

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32."""
        decoded: F32 = edgetune_native.dequantize_int8(self._codes[first:last], self._scb[first:last])
        return decoded


def state_names(name: str) -> list[str]:
    """Return the names that the description of a 4-bit weight can have."""
    return [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
