"""Quantized checkpoints: their weights as ordinary tensors, decoded by rows on demand.

bitsandbytes' 4-bit and 8-bit layers, bit for bit as bitsandbytes decodes them; 8-bit floats and integers with a scale
per tensor, row or block (DeepSeek's `weight_scale_inv`, llm-compressor's `weight_scale`), as the exact product in f32;
the experts of gpt-oss in MXFP4. The tensors that describe a weight are folded into it: callers see one weight of the
original shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.errors import CheckpointError
from edgetune_converters.tensors import F32, FLOAT8, TensorInfo

ViewTensor = Callable[[TensorInfo], NDArray[Any]]
ConfigJson = Mapping[str, Any]

# quant_method of config.json -> a further key with its supported values, None: any
_METHODS: Mapping[str, tuple[str, tuple[Any, ...]] | None] = {
    "bitsandbytes": None,
    "fp8": None,
    "fbgemm_fp8": None,
    "compressed-tensors": ("format", ("float-quantized", "int-quantized", "naive-quantized", "dense", None)),
    "modelopt": ("quant_algo", ("FP8",)),
    "mxfp4": None,
}
# methods whose quantized weights are recognized by their tensors; "none": old entries name none
_STORED_METHODS = (*_METHODS, "gptq", "awq", "aqlm", "eetq", "hqq", "none")
# what tells that weights are stored quantized: integers and small floats, and the names of codes and scales
_PACKED_DTYPES = ("U8", "I8", "I16", "I32", "U16", "U32", *FLOAT8)
_PACKED_PARTS = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "absmax", "quant_map"),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
        *("weight_zero_point", "weight_shape", "codes", "codebooks", "Qidxs", "trellis"),
    }
)
_PACKED_ENDS = ("_blocks", "_scales", "_scale", "_scale_inv")
_OF_CACHE = re.compile(r".*\.[qkv]_scale")
_HINT = "Give the original 16-bit or 32-bit model that it was made from, or fetch this one again"
_BLOCK = (128, 128)
_MAX_SCALES = 2**28
_FLOATS = ("F32", "F16", "BF16")


class WeightDecoder(Protocol):
    """Decodes one quantized weight."""

    @property
    def info(self) -> TensorInfo:
        """Name and original shape of the weight; `dtype` as it is stored."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the stored tensors that belong to it."""

    def rows(self, first: int, last: int) -> F32:
        """Return rows first..last as a fresh f32 array."""


def is_outdated_entry(config: ConfigJson, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether config.json declares a quantization that the tensors do not have: all are floats, none is a scale.

    Merged models often keep the entry of the quantized model that they were trained on. An entry that says how plain
    weights are computed with (bitnet, transforms) is not outdated.
    """
    entry = config.get("quantization_config")
    stated = entry if isinstance(entry, dict) else {}
    if not entry or stated.get("quant_method", "none") not in _STORED_METHODS or stated.get("transform_config"):
        return False
    return not any(
        info.dtype in _PACKED_DTYPES or name.rpartition(".")[2] in _PACKED_PARTS or name.endswith(_PACKED_ENDS)
        for name, info in tensors.items()
    )


def check_method(path: object, config: ConfigJson) -> None:
    """Raise CheckpointError when config.json declares a quantization method that is not supported."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    stated = quantization if isinstance(quantization, dict) else {}
    method = stated.get("quant_method", "unknown")
    if isinstance(method, str) and method in _METHODS:
        key, values = _METHODS[method] or ("quant_method", (method,))
        if stated.get(key) in values and not stated.get("transform_config"):
            return
        method = f"{method}, {key} {stated.get(key)!r}"
    raise CheckpointError(
        f"the checkpoint {path} is already quantized ({method}), in a way that is not read",
        "Give the original 16-bit or 32-bit model that it was made from",
    )


def decoders(tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> dict[str, WeightDecoder]:
    """Return the quantized weights of a checkpoint by name; `view` returns the elements of a tensor without a copy.

    Raises CheckpointError with every weight of which a part is missing or does not fit.
    """
    found: dict[str, WeightDecoder] = {}
    problems: list[str] = []
    quantization = config.get("quantization_config")
    for name, info in tensors.items():
        kind = _kind(name, info, tensors, bool(quantization))
        if kind is None:
            continue
        try:
            found[name] = kind(name, tensors, quantization if isinstance(quantization, dict) else {}, view)
        except _Misfit as misfit:
            problems.append(str(misfit))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{name} cannot be decoded: {error.args[0] if error.args else error!r}")
    if problems:
        raise CheckpointError.of_many("quantized weights that cannot be read", problems, _HINT)
    return found


def fold_parts(tensors: Mapping[str, TensorInfo], found: Mapping[str, WeightDecoder]) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with each quantized weight as one tensor of its original shape.

    Scales of the key-value cache are dropped: they concern runtimes with an 8-bit cache.
    """
    parts = {part for decoder in found.values() for part in decoder.parts}
    return {
        name: found[name].info if name in found else info
        for name, info in tensors.items()
        if name in found or not (name in parts or (found and _OF_CACHE.fullmatch(name)))
    }


class _Misfit(Exception):
    """What is wrong with one weight, as a sentence with its name."""


MakeDecoder = Callable[[str, Mapping[str, TensorInfo], ConfigJson, ViewTensor], WeightDecoder]


def _kind(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], is_quantized: bool) -> MakeDecoder | None:
    """The decoder of a weight, None for a plain one: found by the tensors that accompany it, not by config.json."""
    if name.endswith(_BLOCKS) and _scales_of(name) in tensors:
        return _Mxfp4
    if not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    if any(other in tensors for other in (f"{name}.absmax", *_state_names(name))):
        return _FourBit
    if f"{module}.SCB" in tensors or (info.dtype == "I8" and _scale(module, tensors) is None):
        return _Int8
    if _scale(module, tensors) is not None or (info.dtype in FLOAT8 and is_quantized):
        return _ScaledWeight
    if info.dtype == "U8" and is_quantized:
        return _FourBit
    return None


def _is(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _state_names(name: str) -> list[str]:
    return [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]


def _scale(module: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    return next((name for part in _SCALES if (name := f"{module}.{part}") in tensors), None)


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


class _FourBit:
    """A weight of bitsandbytes' Linear4bit, decoded to its original dtype."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        own = [part for part in tensors if part.startswith(name + ".")]
        missing = [part for part in ("absmax", "quant_map") if f"{name}.{part}" not in tensors]
        missing += ["quant_state"] if not any(state in tensors for state in _state_names(name)) else []
        if missing:
            raise _Misfit(f"{name} is stored in 4 bits, but its {' and '.join(missing)} {_is(missing)} missing")
        weight = edgetune_native.saved_4bit(name, {part: view(tensors[part]) for part in [name, *own]})
        if len(weight.shape) != 2:
            raise _Misfit(f"{name} has the shape {list(weight.shape)} in its quant_state; matrices are read")
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


class _Int8:
    """A weight of bitsandbytes' Linear8bitLt: integers, and the largest weight of each row."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        module = name.removesuffix(".weight")
        info = tensors[name]
        scb, layout = tensors.get(f"{module}.SCB"), tensors.get(f"{module}.weight_format")
        if scb is None:
            raise _Misfit(f"{name} is stored in 8 bits, but {module}.SCB, the scales of its rows, is missing")
        if info.dtype != "I8" or len(info.shape) != 2:
            raise _Misfit(f"{name} is {info.dtype} {list(info.shape)}, not a matrix of 8-bit integers")
        if scb.dtype != "F32" or scb.shape not in ((info.shape[0],), (info.shape[0], 1)):
            raise _Misfit(
                f"{scb.name} is {scb.dtype} {list(scb.shape)}, not a float for each row of {list(info.shape)}"
            )
        if layout is not None and view(layout).any():
            raise _Misfit(f"{name} is stored in a layout of some GPU ({layout.name} is not 0)")
        self._codes = view(info).reshape(info.shape)
        self._scb = np.ascontiguousarray(view(scb).reshape(-1))
        self.parts: tuple[str, ...] = (name, scb.name) if layout is None else (name, scb.name, layout.name)
        self.info = replace(info, dtype="INT8", bytes=sum(tensors[part].bytes for part in self.parts))

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32."""
        decoded: F32 = edgetune_native.dequantize_int8(self._codes[first:last], self._scb[first:last])
        return decoded


# -- a number and a scale ----------------------------------------------------------------------------------------------

# names of a weight's scales; DeepSeek's "inv" is the inverse of the divisor, so it is multiplied too
_SCALES = ("weight_scale_inv", "weight_scale")
# tensors that may accompany such a weight and do not affect it: scales of activations and of the cache
_UNUSED = ("input_scale", "output_scale", "activation_scale", "input_zero_point")


class _ScaledWeight:
    """Small floats or integers times scales: one per tensor, row, or block of rows and columns."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        module = name.removesuffix(".weight")
        info = tensors[name]
        scale_name = _scale(module, tensors)
        if scale_name is None:
            raise _Misfit(f"{name} is {info.dtype}, but its scale ({' or '.join(_SCALES)}) is missing")
        if info.dtype not in (*FLOAT8, "I8") or len(info.shape) != 2 or not all(info.shape):
            raise _Misfit(f"{name} is {info.dtype} {list(info.shape)}; with a scale 8-bit matrices are read")
        if f"{module}.weight_zero_point" in tensors:
            raise _Misfit(f"{name} has zero points, which are not read")
        self._scales = _scale_grid(tensors[scale_name], info, config, view)
        self._codes = view(info).reshape(info.shape)
        self._table = FLOAT8.get(info.dtype)
        unused = [part for part in (f"{module}.{other}" for other in _UNUSED) if part in tensors]
        self.parts: tuple[str, ...] = (name, scale_name, *unused)
        self.info = replace(info, bytes=sum(tensors[part].bytes for part in self.parts))

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product, rounded once."""
        codes = self._codes[first:last]
        decoded = codes.astype(np.float32) if self._table is None else self._table[codes]
        decoded *= self._scales(first, last)
        return decoded


@dataclass(frozen=True)
class _Grid:
    """Scales as a matrix [a, b], each for a block of `block` rows and columns."""

    values: F32
    block: tuple[int, int]
    columns: int

    def __call__(self, first: int, last: int) -> F32:
        """Return the scales of rows first..last, [rows, columns] or [rows, 1]."""
        rows = self.values[np.arange(first, last) // self.block[0]]
        if self.values.shape[1] == 1:
            return rows
        return np.repeat(rows, self.block[1], axis=1)[:, : self.columns]


def _scale_grid(scale: TensorInfo, weight: TensorInfo, config: ConfigJson, view: ViewTensor) -> _Grid:
    shape = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    if scale.dtype not in _FLOATS or len(scale.shape) > 2 or math.prod(shape) > _MAX_SCALES:
        raise _Misfit(f"{scale.name} is {scale.dtype} {list(scale.shape)}; scales are matrices of {', '.join(_FLOATS)}")
    stated = _stated_block(config)
    block = [
        length if count == 1 else 1 if count == length else size
        for count, length, size in zip(shape, weight.shape, stated, strict=True)
    ]
    if any(-(-length // size) != count for count, length, size in zip(shape, weight.shape, block, strict=True)):
        raise _Misfit(
            f"{scale.name} has the shape {list(scale.shape)}, which does not fit {weight.name} {list(weight.shape)} in "
            f"blocks of {stated[0]} x {stated[1]}"
        )
    values = view(scale).reshape(shape)
    if scale.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise _Misfit(f"{scale.name} holds NaN or infinity")
    return _Grid(values, (block[0], block[1]), weight.shape[1])


def _stated_block(config: Mapping[str, Any]) -> Sequence[int]:
    """Rows and columns of a block, where config.json states them."""
    for block in (config.get("weight_block_size"), *_block_structures(config)):
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block
    return _BLOCK


def _block_structures(config: Mapping[str, Any]) -> Iterator[Any]:
    """llm-compressor states the block in each of its groups."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights.get("block_structure")


# -- MXFP4 -------------------------------------------------------------------------------------------------------------

_BLOCKS = "_blocks"
_WEIGHTS_OF_A_BLOCK = 32
# the values of E2M1, by code; a byte holds two codes, the first in its low half
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
# E8M0: powers of two with a bias of 127; the last code is NaN
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)


def _scales_of(name: str) -> str:
    return name.removesuffix(_BLOCKS) + "_scales"


class _Mxfp4:
    """The matrices of all experts in blocks of 32 four-bit floats with one power of two each (OCP MX, 2023)."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        info, scales = tensors[name], tensors[_scales_of(name)]
        if info.dtype != "U8" or len(info.shape) != 4 or info.shape[-1] * 2 != _WEIGHTS_OF_A_BLOCK:
            raise _Misfit(f"{name} is {info.dtype} {list(info.shape)}, not blocks of 16 bytes")
        if scales.dtype != "U8" or scales.shape != info.shape[:-1]:
            raise _Misfit(f"{scales.name} is {scales.dtype} {list(scales.shape)}, not a byte for each block of {name}")
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
        decoded: F32 = _PAIRS[codes].reshape(*scales.shape, _WEIGHTS_OF_A_BLOCK) * _POWERS[scales][..., None]
        return decoded.reshape(last - first, -1)
