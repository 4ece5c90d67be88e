"""The weight formats of bitsandbytes: NF4 and FP4 with plain or nested absmax, and LLM.int8.

All arithmetic is that of bitsandbytes 0.50 on the CPU, bit for bit. It differs from bitsandbytes, or from its other
devices, in these points:

- Blocks continue across the ends of rows. The AVX-512 build of bitsandbytes reads wrong absmax if a row is not a whole
  number of blocks but a multiple of 16 (its other paths do not); here each element has the absmax of its own block.
- bfloat16 results below 2^-126 are rounded; bitsandbytes makes them 0 on CPUs with AVX512-BF16.
- FP4 has two codes for 0, and both give +0; some paths of bitsandbytes give -0 for the second.
- CUDA: given codes and absmax give the same weights. NF4 codes differ only where its approximate 1/absmax carries a
  weight over a bound (CUDA multiplies in a last block that is not whole, where the CPU divides). FP4 has bounds that
  differ in the last digits. Codes of nested absmax differ: CUDA searches the map, the CPU rounds to 65536 steps first.
  So the exact weights of a GPU run come from its saved tensors (`dequantize_4bit`), not from quantizing again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _backend, _bnb_maps, _kernels
from ._checks import F32, Rows, array, output, stored_rows, thread_count
from .results import FourBit, NestedAbsmax

__all__ = [
    "absmax_mean",
    "block_absmax",
    "dequantize_4bit",
    "dequantize_int8",
    "nested_scales",
    "nf4_roundtrip",
    "quantize_4bit",
    "saved_4bit",
]

_DTYPES = {"f32": _kernels.F32, "f16": _kernels.F16, "bf16": _kernels.BF16}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}
_SAVED_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCKSIZE = 256


def block_absmax(rows: Rows, *, blocksize: int = 64, threads: int = 0) -> NDArray[np.float32]:
    """Return the largest |weight| of each block, with which bitsandbytes scales its 4-bit codes.

    Args:
        rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16; finite.
        blocksize: elements per block, 32 to 4096, a power of two; blocks continue across the ends of rows.
        threads: number of threads; 0 means one per core.

    Returns:
        [ceil(n k / blocksize)] float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape, or a row is not finite; the message names the row.
    """
    source, dtype = _weights(rows)
    _choice(blocksize, "blocksize", _BLOCKSIZES)
    n, k = source.shape
    absmax = np.empty(-(-n * k // blocksize), np.float32)
    _backend.kernels.absmax_4bit(source, dtype, n, k, blocksize, absmax, thread_count(threads))
    return absmax


def absmax_mean(absmax: NDArray[np.float32], *, torch_threads: int = 1) -> float:
    """Return the mean of the absmax in float32, which is the offset of nested absmax.

    The order of additions is that of PyTorch's CPU kernel, so the last bits are the same.

    Args:
        absmax: [blocks] float32 of the whole tensor; not empty.
        torch_threads: number of threads that PyTorch had. From 32768 blocks (2 M weights) on, each thread sums a part
            of its own, which changes the last bits. The instruction set (any x86-64) does not change them.

    Returns:
        The offset; a float32 in value.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape, or the mean overflows.
    """
    checked = array(absmax, "absmax", F32, (None,))
    if not checked.size:
        raise ValueError("absmax is empty, so it has no mean")
    mean = _backend.kernels.torch_mean(checked, checked.size, _torch_threads(torch_threads))
    if not math.isfinite(mean):
        raise ValueError(f"the mean of the absmax is {mean}: the weights are too large for nested absmax")
    return mean


def nested_scales(
    absmax: NDArray[np.float32],
    *,
    offset: float | None = None,
    nested_quant_map: NDArray[np.float32] | None = None,
    torch_threads: int = 1,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Return absmax after double quantization: encoded in 8 bits in nested blocks of 256, and decoded.

    Args:
        absmax: [blocks] float32 of the whole tensor, finite; not empty.
        offset: subtracted before encoding and added after decoding; `absmax_mean` if None.
        nested_quant_map: [256] float32, ascending; bitsandbytes' dynamic map if None.
        torch_threads: number of threads that PyTorch had, see `absmax_mean`; not used if `offset` is given.
        threads: number of threads; 0 means one per core.

    Returns:
        [blocks] float32: the `scales` of `nf4_roundtrip`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape.
    """
    checked = array(absmax, "absmax", F32, (None,))
    if not np.isfinite(checked).all():
        raise ValueError(f"absmax[{np.flatnonzero(~np.isfinite(checked))[0]}] is not finite")
    workers = thread_count(threads)
    return _unnest(*_nest(checked, offset, nested_quant_map, torch_threads, workers), workers)


def quantize_4bit(
    rows: Rows,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    offset: float | None = None,
    nested_quant_map: NDArray[np.float32] | None = None,
    torch_threads: int = 1,
    threads: int = 0,
) -> FourBit:
    """Quantize weights to 4 bits: `bitsandbytes.functional.quantize_4bit` on the CPU, byte for byte.

    Args:
        rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16; finite, not empty.
        quant_type: `nf4` or `fp4`.
        blocksize: elements per block, 32 to 4096, a power of two.
        double_quant: encode the absmax in 8 bits (`compress_statistics`).
        offset: subtracted from the absmax first; their mean (`absmax_mean`) if None.
        nested_quant_map: [256] float32, ascending, the 8-bit map; bitsandbytes' dynamic map if None. On CPUs
            without fused multiply-add PyTorch builds that map with some values 2 ulp off.
        torch_threads: number of threads that PyTorch had, see `absmax_mean`; not used if `offset` is given.
        threads: number of threads; 0 means one per core. The bytes do not depend on it.

    Returns:
        The packed codes and the quantization state.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape, or a row is not finite; the message names the row.
    """
    source, dtype = _weights(rows)
    n, k = source.shape
    _choice(quant_type, "quant_type", _bnb_maps.QUANT_TYPES)
    values = _bnb_maps.four_bit_map(quant_type)
    workers = thread_count(threads)
    _only_nested(double_quant, offset, nested_quant_map)
    absmax = block_absmax(source, blocksize=blocksize, threads=workers)
    codes: NDArray[np.uint8] | NDArray[np.float32] = absmax
    nested = None
    if double_quant:
        codes, nested = _nest(absmax, offset, nested_quant_map, torch_threads, workers)
    packed = np.empty(-(-n * k // 2), np.uint8)
    _backend.kernels.quantize_4bit(source, dtype, n, k, absmax, blocksize, values, packed, workers)
    return FourBit(packed, codes, nested, values.copy(), (n, k), quant_type, blocksize, _DTYPE_NAMES[dtype])


def _nest(
    absmax: NDArray[np.float32],
    offset: float | None,
    quant_map: NDArray[np.float32] | None,
    torch_threads: int,
    threads: int,
) -> tuple[NDArray[np.uint8], NestedAbsmax]:
    """Return the 8-bit codes of absmax and how to decode them."""
    if quant_map is None:
        table, nearest = _bnb_maps.dynamic_map().copy(), _bnb_maps.nearest_dynamic_codes()
    else:
        table = array(quant_map, "nested_quant_map", F32, (256,))
        if not (np.isfinite(table).all() and (table[:-1] <= table[1:]).all()):
            raise ValueError("nested_quant_map is not finite and ascending")
        nearest = _bnb_maps.nearest_codes(table)
    if offset is None:
        offset = absmax_mean(absmax, torch_threads=torch_threads)
    codes = np.empty(absmax.size, np.uint8)
    scales = np.empty(-(-absmax.size // _NESTED_BLOCKSIZE), np.float32)
    nested = NestedAbsmax(scales, table, _finite(offset, "offset"), _NESTED_BLOCKSIZE)
    _backend.kernels.nest_absmax(absmax, absmax.size, nested.offset, nearest, _NESTED_BLOCKSIZE, codes, scales, threads)
    return codes, nested


def _unnest(codes: NDArray[np.uint8], nested: NestedAbsmax, threads: int) -> NDArray[np.float32]:
    absmax = np.empty(codes.size, np.float32)
    _backend.kernels.unnest_absmax(
        codes, codes.size, nested.quant_map, nested.absmax, nested.blocksize, nested.offset, absmax, threads
    )
    return absmax


def dequantize_4bit(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.uint8] | NDArray[np.float32],
    shape: Sequence[int],
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: NestedAbsmax | None = None,
    quant_map: NDArray[np.float32] | None = None,
    dtype: str = "f32",
    rows: tuple[int, int] | None = None,
    threads: int = 0,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Dequantize 4-bit codes: `bitsandbytes.functional.dequantize_4bit`, bit for bit.

    The arguments are the tensors that a saved checkpoint holds for one weight (`saved_4bit` reads them).

    Args:
        packed: uint8 of any shape, ceil(elements / 2) bytes, the code of the even element in the high half; view
            other storage types (`bnb_4bit_quant_storage`) as uint8 first.
        absmax: [blocks] float32, or uint8 codes together with `nested`.
        shape: the shape of the weight, [n, k] or any other.
        quant_type: `nf4` or `fp4`.
        blocksize: elements per block, 32 to 4096, a power of two.
        nested: how to decode the absmax if they are uint8 codes.
        quant_map: [16] float32, checked to be the map of `quant_type`; bitsandbytes itself does not read it.
        dtype: `f32`, `f16` or `bf16`, to which the float32 products are rounded (to nearest, ties to even).
        rows: (begin, end) of the first axis, to compute only those rows; None computes all.
        threads: number of threads; 0 means one per core.
        out: float32 to write into, of the shape of the result, not overlapping an input; None allocates it.

    Returns:
        float32 of `shape`, or [end - begin, *shape[1:]]; every value is one of `dtype`.

    Raises:
        TypeError: an argument has the wrong type or dtype; nothing has been written.
        ValueError: an argument has the wrong value or shape; nothing has been written.
    """
    lengths = _shape(shape)
    _choice(quant_type, "quant_type", _bnb_maps.QUANT_TYPES)
    _choice(blocksize, "blocksize", _BLOCKSIZES)
    _choice(dtype, "dtype", tuple(_DTYPES))
    values = _bnb_maps.four_bit_map(quant_type)
    if quant_map is not None and not np.array_equal(array(quant_map, "quant_map", F32, (16,)), values):
        raise ValueError(f"quant_map is not that of {quant_type}")
    source = _packed(packed, lengths)
    blocks = -(-math.prod(lengths) // blocksize)
    scales = array(absmax, "absmax", np.dtype(np.uint8) if nested else F32, (blocks,))
    inputs = [source, scales]
    if nested:
        nested = _checked_nesting(nested, blocks)
        inputs.append(nested.absmax)
    begin, end = _range(rows, lengths[0])
    workers = thread_count(threads)
    result = output(out, (end - begin, *lengths[1:]), F32, *inputs)
    if result.size:
        row = math.prod(lengths[1:])
        stored = FourBit(source, scales, nested, values, lengths, quant_type, blocksize, dtype)
        _dequantize_elements(stored, begin * row, end * row, result.reshape(-1), workers)
    return result


def _dequantize_elements(stored: FourBit, begin: int, end: int, out: NDArray[np.float32], threads: int) -> None:
    """Dequantize elements begin .. end-1, by way of the whole blocks around them."""
    size = stored.blocksize
    first, last = begin // size, -(-end // size)
    stop = min(last * size, math.prod(stored.shape))
    if stored.nested:
        codes: NDArray[np.uint8] = stored.absmax.view(np.uint8)
        scales = _unnest_blocks(codes, stored.nested, first, last, threads)
    else:
        scales = stored.absmax[first:last].view(np.float32)
    whole = first * size == begin and stop == end
    target = out if whole else np.empty(stop - first * size, np.float32)
    packed = stored.packed[first * size // 2 : -(-stop // 2)]
    dtype = _DTYPES[stored.dtype]
    _backend.kernels.dequantize_4bit(packed, target.size, scales, size, stored.quant_map, dtype, target, threads)
    if not whole:
        out[...] = target[begin - first * size :][: out.size]


def _unnest_blocks(
    codes: NDArray[np.uint8], nested: NestedAbsmax, first: int, last: int, threads: int
) -> NDArray[np.float32]:
    """Decode absmax first .. last-1, from the start of the nested block that contains `first`."""
    outer = first // nested.blocksize
    begin = outer * nested.blocksize
    part = nested._replace(absmax=nested.absmax[outer : -(-last // nested.blocksize)])
    return _unnest(codes[begin:last], part, threads)[first - begin :]


def saved_4bit(name: str, tensors: Mapping[str, NDArray[Any]]) -> FourBit:
    """Read one 4-bit weight as bitsandbytes saves it (`QuantState.as_dict(packed=True)` and transformers' names).

    Args:
        name: the name of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        tensors: `name`, the packed codes (uint8, any shape); `name.absmax` and `name.quant_map`; with nested absmax
            `name.nested_absmax` and `name.nested_quant_map`; and `name.quant_state.bitsandbytes__nf4` or `__fp4`
            (uint8), the JSON of the rest. Other names are not read.

    Returns:
        The arguments of `dequantize_4bit`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the JSON is not as described. Sizes and dtypes are checked by `dequantize_4bit`.
    """
    found = [kind for kind in _bnb_maps.QUANT_TYPES if f"{name}.quant_state.bitsandbytes__{kind}" in tensors]
    if len(found) != 1:
        raise KeyError(f"{name} has {len(found)} tensors quant_state.bitsandbytes__nf4 or __fp4, expected one")
    text = np.ascontiguousarray(tensors[f"{name}.quant_state.bitsandbytes__{found[0]}"], np.uint8).tobytes()
    nested = None
    try:
        facts = json.loads(text)
        dtype = _SAVED_DTYPES[facts["dtype"]]
        shape, blocksize = _shape(facts["shape"]), facts["blocksize"]
        _choice(facts["quant_type"], "quant_type", (found[0],))
        if f"{name}.nested_absmax" in tensors:
            nested = NestedAbsmax(
                tensors[f"{name}.nested_absmax"],
                tensors[f"{name}.nested_quant_map"],
                _finite(facts["nested_offset"], "nested_offset"),
                facts["nested_blocksize"],
            )
            _choice(facts["nested_dtype"], "nested_dtype", ("float32",))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"the quant_state of {name} cannot be read: {error!r}") from error
    packed = tensors[name].reshape(-1)
    quant_map = tensors[f"{name}.quant_map"]
    return FourBit(packed, tensors[f"{name}.absmax"], nested, quant_map, shape, found[0], blocksize, dtype)


def _checked_nesting(nested: object, blocks: int) -> NestedAbsmax:
    if not isinstance(nested, NestedAbsmax):
        raise TypeError(f"nested must be a NestedAbsmax, not {type(nested).__name__}")
    size = nested.blocksize
    if type(size) is not int or size < 2 or size % 2 or size > 2**31:
        raise ValueError(f"nested.blocksize is {size!r}, expected an even int from 2 to {2**31}")
    return NestedAbsmax(
        array(nested.absmax, "nested.absmax", F32, (-(-blocks // size),)),
        array(nested.quant_map, "nested.quant_map", F32, (256,)),
        _finite(nested.offset, "nested.offset"),
        size,
    )


def nf4_roundtrip(
    rows: Rows,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    offset: float | None = None,
    nested_quant_map: NDArray[np.float32] | None = None,
    torch_threads: int = 1,
    scales: NDArray[np.float32] | None = None,
    dtype: str | None = None,
    threads: int = 0,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return D = dequantize(quantize(W)), the weights on top of which a QLoRA adapter was trained.

    The result is that of bitsandbytes' `dequantize_4bit(*quantize_4bit(rows))` on the CPU, bit for bit. A tensor may be
    given in pieces of rows that begin at whole blocks, once the scales of the whole tensor are known: `nested_scales`
    of the concatenated `block_absmax` of its pieces, or the scales recorded in training. Each piece gets its part of
    them.

    Args:
        rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16, as the weight was when bitsandbytes
            quantized it; finite, not empty.
        blocksize: elements per block, 32 to 4096, a power of two.
        double_quant: whether the absmax were encoded in 8 bits (`bnb_4bit_use_double_quant`).
        quant_type: `nf4` or `fp4`.
        offset: the mean of the absmax as recorded (`nested_offset`); `absmax_mean` of these rows if None.
        nested_quant_map: [256] float32, ascending, as recorded; bitsandbytes' dynamic map if None.
        torch_threads: number of threads that PyTorch had, see `absmax_mean`; not used if `offset` is given.
        scales: [ceil(n k / blocksize)] float32, the factors of the codes; computed from the arguments above if None.
        dtype: `f32`, `f16` or `bf16`, to which D is rounded; that of `rows` if None, as in bitsandbytes.
        threads: number of threads; 0 means one per core. The bits do not depend on it.
        out: [n, k] float32 to write into, not overlapping `rows`; None allocates it.

    Returns:
        [n, k] float32; every value is one of `dtype`.

    Raises:
        TypeError: an argument has the wrong type or dtype; nothing has been written.
        ValueError: an argument has the wrong value or shape, or a row is not finite (the message names the row);
            nothing has been written.
    """
    source, own = _weights(rows)
    n, k = source.shape
    name = _DTYPE_NAMES[own] if dtype is None else dtype
    _choice(name, "dtype", tuple(_DTYPES))
    _choice(quant_type, "quant_type", _bnb_maps.QUANT_TYPES)
    _choice(blocksize, "blocksize", _BLOCKSIZES)
    values = _bnb_maps.four_bit_map(quant_type)
    workers = thread_count(threads)
    result = output(out, (n, k), F32, source)
    _only_nested(double_quant and scales is None, offset, nested_quant_map)
    if scales is not None:
        scales = array(scales, "scales", F32, (-(-n * k // blocksize),))
    absmax = block_absmax(source, blocksize=blocksize, threads=workers)
    if scales is None:
        scales = absmax
        if double_quant:
            scales = _unnest(*_nest(absmax, offset, nested_quant_map, torch_threads, workers), workers)
    _backend.kernels.roundtrip_4bit(
        source, own, n, k, absmax, scales, blocksize, values, _DTYPES[name], result, workers
    )
    return result


def dequantize_int8(
    codes: NDArray[np.int8],
    scb: NDArray[np.float32],
    *,
    dtype: str = "f32",
    threads: int = 0,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Dequantize LLM.int8 weights: `bitsandbytes.functional.int8_vectorwise_dequant`, bit for bit.

    A weight is code * scb * (1/127), each product rounded to float32. transformers and PEFT dequantize with the same
    function and cast the result to their dtype.

    Args:
        codes: [n, k] int8, the saved `weight` (row layout, `weight_format` 0).
        scb: [n] float32, the saved `SCB`: the largest |weight| of each row.
        dtype: `f32`, `f16` or `bf16`, to which the weights are rounded (to nearest, ties to even).
        threads: number of threads; 0 means one per core.
        out: [n, k] float32 to write into, not overlapping an input; None allocates it.

    Returns:
        [n, k] float32; every value is one of `dtype`.

    Raises:
        TypeError: an argument has the wrong type or dtype; nothing has been written.
        ValueError: an argument has the wrong value or shape; nothing has been written.
    """
    _choice(dtype, "dtype", tuple(_DTYPES))
    source = array(codes, "codes", np.dtype(np.int8), (None, None))
    n, k = source.shape
    scales = array(scb, "scb", F32, (n,))
    workers = thread_count(threads)
    result = output(out, (n, k), F32, source, scales)
    _backend.kernels.dequantize_int8(source, scales, n, k, _DTYPES[dtype], result, workers)
    return result


def _weights(rows: object) -> tuple[NDArray[Any], int]:
    checked, dtype = stored_rows(rows)
    if not checked.size:
        raise ValueError(f"rows has shape {checked.shape}: there is nothing to quantize")
    return checked, dtype


def _choice(value: object, name: str, known: Sequence[object]) -> None:
    if value not in known or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")


def _finite(value: object, name: str) -> float:
    """Return a number rounded to float32, which must be finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise ValueError(f"{name} is {value}, expected a finite float32")
    return rounded


def _shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)) or not all(type(length) is int for length in shape):
        raise TypeError(f"shape must be a tuple of int, not {shape!r}")
    if not shape or min(shape) < 0:
        raise ValueError(f"shape is {tuple(shape)}, expected at least one length and none below 0")
    return tuple(shape)


def _packed(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the packed codes of a tensor of that shape, flat."""
    flat = array(packed, "packed", np.dtype(np.uint8), (None,) * np.ndim(packed)).reshape(-1)
    wanted = -(-math.prod(shape) // 2)
    if flat.size != wanted:
        raise ValueError(f"packed holds {flat.size} bytes, expected {wanted} for the shape {shape}")
    return flat


def _range(rows: object, length: int) -> tuple[int, int]:
    if rows is None:
        return 0, length
    if not isinstance(rows, tuple) or len(rows) != 2 or not all(type(bound) is int for bound in rows):
        raise TypeError(f"rows must be (begin, end), not {rows!r}")
    begin, end = rows
    if not 0 <= begin <= end <= length:
        raise ValueError(f"rows is {rows}, expected 0 <= begin <= end <= {length}")
    return begin, end


def _torch_threads(threads: object) -> int:
    checked = thread_count(threads)
    if not checked:
        raise ValueError("torch_threads is 0, expected the number of threads that PyTorch had")
    return checked


def _only_nested(double_quant: bool, offset: object, quant_map: object) -> None:
    if not double_quant and (offset is not None or quant_map is not None):
        raise ValueError("offset and nested_quant_map need double_quant and exclude scales")
