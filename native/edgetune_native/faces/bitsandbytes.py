"""The weight formats of bitsandbytes: NF4 and FP4 with plain or nested absmax, and LLM.int8.

All arithmetic is that of bitsandbytes 0.50 on the CPU, bit for bit. What differs from it, or from its other devices:

- Blocks run on over the ends of rows. bitsandbytes' AVX-512 build reads wrong absmax when a row is no whole number of
  blocks but a multiple of 16 (its other paths do not); here each element has the absmax of its own block.
- bfloat16 results below 2^-126 are rounded; bitsandbytes makes them 0 on CPUs with AVX512-BF16.
- FP4 has two codes for 0, and both give +0; some paths of bitsandbytes give -0 for the second.
- CUDA: from given codes and absmax the weights are the same. Codes of NF4 differ only where its approximate 1/absmax
  carries a weight over a bound (a last block that is not whole is multiplied there, not divided); FP4 has bounds that
  differ in the last digits. Nested absmax codes differ: CUDA searches the map, the CPU rounds to 65536 steps first. So
  what a GPU quantized is had exactly from the saved tensors (`dequantize_4bit`), not from a new quantization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_native import _kernels, _maps
from edgetune_native.results import FourBit, NestedAbsmax

from .checks import array, thread_count

_DTYPES = {"f32": _kernels.F32, "f16": _kernels.F16, "bf16": _kernels.BF16}
_SAVED_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_ROW_DTYPES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16"}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCKSIZE = 256
_F32 = np.dtype(np.float32)

Rows = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]


def _choice(value: object, name: str, known: Sequence[object]) -> None:
    if value not in known or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")


def _rows(rows: object) -> NDArray[Any]:
    if not isinstance(rows, np.ndarray) or rows.dtype not in _ROW_DTYPES:
        found = f"dtype {rows.dtype}" if isinstance(rows, np.ndarray) else f"type {type(rows).__name__}"
        raise TypeError(f"rows has {found}, expected a numpy array of float32, float16 or uint16 (bfloat16 bits)")
    checked = array(rows, "rows", None, (None, None))
    if not checked.size:
        raise ValueError(f"rows has shape {checked.shape}: there is nothing to quantize")
    return checked


def _out(out: object, shape: tuple[int, ...], *sources: NDArray[Any]) -> NDArray[np.float32]:
    """Return the array to write into: the caller's, if it fits and overlaps no source, or a new one."""
    if out is None:
        return np.empty(shape, np.float32)
    checked: NDArray[np.float32] = array(out, "out", _F32, shape)
    if checked is not out:
        raise ValueError("out is not aligned to its elements")
    if not checked.flags.writeable:
        raise ValueError("out is read-only")
    if any(np.may_share_memory(checked, source) for source in sources):
        raise ValueError("out overlaps an input")
    return checked


def _finite(value: object, name: str) -> float:
    """Return a number as the float32 that it is."""
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
    """Return the codes of a tensor of that shape, flat."""
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
        raise ValueError("torch_threads is 0, expected how many threads PyTorch had")
    return checked


def _only_nested(double_quant: bool, offset: object, quant_map: object) -> None:
    if not double_quant and (offset is not None or quant_map is not None):
        raise ValueError("offset and nested_quant_map mean something with double_quant and without scales only")


class BitsandbytesFace:
    """4-bit and int8 weights as bitsandbytes has them."""

    _kernels: _kernels.Kernels

    def block_absmax(self, rows: Rows, *, blocksize: int = 64, threads: int = 0) -> NDArray[np.float32]:
        """Return the largest |weight| of each block, as bitsandbytes takes it when it quantizes to 4 bits.

        Args:
            rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16; finite.
            blocksize: elements per block, 32 to 4096, a power of two; blocks run on over the ends of rows.
            threads: how many threads; 0 is one per core.

        Returns:
            [ceil(n k / blocksize)] float32.

        Raises:
            TypeError, ValueError: an argument is not as described; ValueError names the row that is not finite.
        """
        source = _rows(rows)
        _choice(blocksize, "blocksize", _BLOCKSIZES)
        n, k = source.shape
        absmax = np.empty(-(-n * k // blocksize), np.float32)
        dtype = _DTYPES[_ROW_DTYPES[source.dtype]]
        self._kernels.absmax_4bit(source, dtype, n, k, blocksize, absmax, thread_count(threads))
        return absmax

    def absmax_mean(self, absmax: NDArray[np.float32], *, torch_threads: int = 1) -> float:
        """Return the offset of nested absmax: their mean, in float32, as PyTorch's CPU kernel adds them up.

        Args:
            absmax: [blocks] float32 of the whole tensor; not empty.
            torch_threads: how many threads PyTorch had. From 32768 blocks (2 M weights) on each sums a part of its own,
                which changes the last bits. The instruction set (any x86-64) does not.

        Returns:
            The offset; a float32 in value.

        Raises:
            TypeError, ValueError: an argument is not as described, or the mean overflows.
        """
        checked = array(absmax, "absmax", _F32, (None,))
        if not checked.size:
            raise ValueError("absmax is empty, so it has no mean")
        mean = self._kernels.torch_mean(checked, checked.size, _torch_threads(torch_threads))
        if not math.isfinite(mean):
            raise ValueError(f"the mean of the absmax is {mean}: the weights are too large for nested absmax")
        return mean

    def nested_scales(
        self,
        absmax: NDArray[np.float32],
        *,
        offset: float | None = None,
        nested_quant_map: NDArray[np.float32] | None = None,
        torch_threads: int = 1,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Return what double quantization makes of absmax: coded in 8 bits and back, in nested blocks of 256.

        Args:
            absmax: [blocks] float32 of the whole tensor, finite; not empty.
            offset: what is taken off before and added after; `absmax_mean` if None.
            nested_quant_map: [256] float32, ascending; bitsandbytes' dynamic map if None.
            torch_threads: how many threads PyTorch had, see `absmax_mean`; no matter if `offset` is given.
            threads: how many threads; 0 is one per core.

        Returns:
            [blocks] float32: the `scales` of `nf4_roundtrip`.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        checked = array(absmax, "absmax", _F32, (None,))
        if not np.isfinite(checked).all():
            raise ValueError(f"absmax[{np.flatnonzero(~np.isfinite(checked))[0]}] is not finite")
        workers = thread_count(threads)
        return self._unnest(*self._nest(checked, offset, nested_quant_map, torch_threads, workers), workers)

    def quantize_4bit(
        self,
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
            double_quant: whether the absmax are coded in 8 bits (`compress_statistics`).
            offset: what is taken off the absmax before; their mean (`absmax_mean`) if None.
            nested_quant_map: [256] float32, ascending, the 8-bit map; bitsandbytes' dynamic map if None. On CPUs
                without fused multiply-add PyTorch builds that map with some values 2 ulp off.
            torch_threads: how many threads PyTorch has, see `absmax_mean`; no matter if `offset` is given.
            threads: how many threads work here; 0 is one per core. The bytes do not depend on it.

        Returns:
            The bytes and the quantization state.

        Raises:
            TypeError, ValueError: an argument is not as described; ValueError names the row that is not finite.
        """
        source = _rows(rows)
        n, k = source.shape
        dtype = _ROW_DTYPES[source.dtype]
        _choice(quant_type, "quant_type", _maps.QUANT_TYPES)
        values = _maps.four_bit_map(quant_type)
        workers = thread_count(threads)
        _only_nested(double_quant, offset, nested_quant_map)
        absmax = self.block_absmax(source, blocksize=blocksize, threads=workers)
        codes: NDArray[np.uint8] | NDArray[np.float32] = absmax
        nested = None
        if double_quant:
            codes, nested = self._nest(absmax, offset, nested_quant_map, torch_threads, workers)
        packed = np.empty(-(-n * k // 2), np.uint8)
        self._kernels.quantize_4bit(source, _DTYPES[dtype], n, k, absmax, blocksize, values, packed, workers)
        return FourBit(packed, codes, nested, values.copy(), (n, k), quant_type, blocksize, dtype)

    def _nest(
        self,
        absmax: NDArray[np.float32],
        offset: float | None,
        quant_map: NDArray[np.float32] | None,
        torch_threads: int,
        threads: int,
    ) -> tuple[NDArray[np.uint8], NestedAbsmax]:
        """Return the 8-bit codes of absmax and what explains them."""
        if quant_map is None:
            table, nearest = _maps.dynamic_map().copy(), _maps.nearest_dynamic_codes()
        else:
            table = array(quant_map, "nested_quant_map", _F32, (256,))
            if not (np.isfinite(table).all() and (table[:-1] <= table[1:]).all()):
                raise ValueError("nested_quant_map is not finite and ascending")
            nearest = _maps.nearest_codes(table)
        if offset is None:
            offset = self.absmax_mean(absmax, torch_threads=torch_threads)
        codes = np.empty(absmax.size, np.uint8)
        scales = np.empty(-(-absmax.size // _NESTED_BLOCKSIZE), np.float32)
        nested = NestedAbsmax(scales, table, _finite(offset, "offset"), _NESTED_BLOCKSIZE)
        self._kernels.nest_absmax(
            absmax, absmax.size, nested.offset, nearest, _NESTED_BLOCKSIZE, codes, scales, threads
        )
        return codes, nested

    def _unnest(self, codes: NDArray[np.uint8], nested: NestedAbsmax, threads: int) -> NDArray[np.float32]:
        absmax = np.empty(codes.size, np.float32)
        self._kernels.unnest_absmax(
            codes, codes.size, nested.quant_map, nested.absmax, nested.blocksize, nested.offset, absmax, threads
        )
        return absmax

    def dequantize_4bit(
        self,
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
        """Turn 4-bit codes back into weights: `bitsandbytes.functional.dequantize_4bit`, bit for bit.

        The arguments are what a saved checkpoint holds for one weight (`saved_4bit` reads them).

        Args:
            packed: uint8 of any shape, ceil(elements / 2) bytes, the code of the even element in the high half; view
                other storage types (`bnb_4bit_quant_storage`) as uint8 first.
            absmax: [blocks] float32, or the uint8 codes that `nested` explains.
            shape: the shape of the weight, [n, k] or any other.
            quant_type: `nf4` or `fp4`.
            blocksize: elements per block, 32 to 4096, a power of two.
            nested: how the absmax are coded, if they are.
            quant_map: [16] float32, checked to be the map of `quant_type`; bitsandbytes itself does not read it.
            dtype: `f32`, `f16` or `bf16`: what the float32 products are rounded to, to nearest, ties to even.
            rows: (begin, end) of the first axis: only those rows are computed; all if None.
            threads: how many threads; 0 is one per core.
            out: float32 to write into, of the shape of the result, not overlapping an input; a new array if None.

        Returns:
            float32 of `shape`, or [end - begin, *shape[1:]]; every value is one of `dtype`.

        Raises:
            TypeError, ValueError: an argument is not as described; nothing has been written.
        """
        lengths = _shape(shape)
        _choice(quant_type, "quant_type", _maps.QUANT_TYPES)
        _choice(blocksize, "blocksize", _BLOCKSIZES)
        _choice(dtype, "dtype", tuple(_DTYPES))
        values = _maps.four_bit_map(quant_type)
        if quant_map is not None and not np.array_equal(array(quant_map, "quant_map", _F32, (16,)), values):
            raise ValueError(f"quant_map is not that of {quant_type}")
        source = _packed(packed, lengths)
        blocks = -(-math.prod(lengths) // blocksize)
        scales = array(absmax, "absmax", np.dtype(np.uint8) if nested else _F32, (blocks,))
        inputs = [source, scales]
        if nested:
            nested = self._nested(nested, blocks)
            inputs.append(nested.absmax)
        begin, end = _range(rows, lengths[0])
        workers = thread_count(threads)
        result = _out(out, (end - begin, *lengths[1:]), *inputs)
        if not result.size:
            return result

        # Whole blocks around the rows asked for; from the first of them on, all is as in a tensor of its own.
        row = math.prod(lengths[1:])
        first, last = begin * row // blocksize, -(-end * row // blocksize)
        stop = min(last * blocksize, math.prod(lengths))
        scales = self._unnest_blocks(scales, nested, first, last, workers) if nested else scales[first:last]
        whole = first * blocksize == begin * row and stop == end * row
        target = result if whole else np.empty(stop - first * blocksize, np.float32)
        source = source[first * blocksize // 2 : -(-stop // 2)]
        self._kernels.dequantize_4bit(source, target.size, scales, blocksize, values, _DTYPES[dtype], target, workers)
        if not whole:
            skip = begin * row - first * blocksize
            result.reshape(-1)[...] = target[skip : skip + result.size]
        return result

    def _unnest_blocks(
        self, codes: NDArray[np.uint8], nested: NestedAbsmax, first: int, last: int, threads: int
    ) -> NDArray[np.float32]:
        """Return absmax first .. last-1; computed from the nested block in which they begin."""
        outer = first // nested.blocksize
        begin = outer * nested.blocksize
        part = nested._replace(absmax=nested.absmax[outer : -(-last // nested.blocksize)])
        return self._unnest(codes[begin:last], part, threads)[first - begin :]

    def saved_4bit(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> FourBit:
        """Read one 4-bit weight as bitsandbytes saves it (`QuantState.as_dict(packed=True)` and transformers' names).

        Args:
            name: of the weight, `model.layers.0.mlp.up_proj.weight`.
            tensors: under `name` the packed bytes (uint8, any shape); beside it `name.absmax`, `name.quant_map`, with
                nested absmax `name.nested_absmax` and `name.nested_quant_map`, and the JSON of the rest in
                `name.quant_state.bitsandbytes__nf4` or `__fp4` (uint8). Other names are not read.

        Returns:
            What `dequantize_4bit` takes.

        Raises:
            KeyError: a tensor is missing.
            ValueError: the JSON is not as described. Sizes and dtypes are checked by `dequantize_4bit`.
        """
        found = [kind for kind in _maps.QUANT_TYPES if f"{name}.quant_state.bitsandbytes__{kind}" in tensors]
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

    @staticmethod
    def _nested(nested: object, blocks: int) -> NestedAbsmax:
        if not isinstance(nested, NestedAbsmax):
            raise TypeError(f"nested must be a NestedAbsmax, not {type(nested).__name__}")
        size = nested.blocksize
        if type(size) is not int or size < 2 or size % 2 or size > 2**31:
            raise ValueError(f"nested.blocksize is {size!r}, expected an even int from 2 to {2**31}")
        return NestedAbsmax(
            array(nested.absmax, "nested.absmax", _F32, (-(-blocks // size),)),
            array(nested.quant_map, "nested.quant_map", _F32, (256,)),
            _finite(nested.offset, "nested.offset"),
            size,
        )

    def nf4_roundtrip(
        self,
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
        """Return D = dequantize(quantize(W)): what a QLoRA adapter was trained against.

        Bit for bit `dequantize_4bit(*quantize_4bit(rows))` of bitsandbytes on the CPU. A tensor may be given in pieces
        of rows that begin at whole blocks, once the scales of the whole are known: `nested_scales` of the concatenated
        `block_absmax` of its pieces, or what was recorded in training; each piece gets its part of them.

        Args:
            rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16, as the weight was when bitsandbytes
                quantized it; finite, not empty.
            blocksize: elements per block, 32 to 4096, a power of two.
            double_quant: whether the absmax were coded in 8 bits (`bnb_4bit_use_double_quant`).
            quant_type: `nf4` or `fp4`.
            offset: the mean of the absmax as recorded (`nested_offset`); `absmax_mean` of these rows if None.
            nested_quant_map: [256] float32, ascending, as recorded; bitsandbytes' dynamic map if None.
            torch_threads: how many threads PyTorch had, see `absmax_mean`; no matter if `offset` is given.
            scales: [ceil(n k / blocksize)] float32, what the codes are multiplied by; computed from the arguments above
                if None.
            dtype: what D is rounded to, `f32`, `f16` or `bf16`; that of `rows` if None, as in bitsandbytes.
            threads: how many threads work here; 0 is one per core. The bits do not depend on it.
            out: [n, k] float32 to write into, not overlapping `rows`; a new array if None.

        Returns:
            [n, k] float32; every value is one of `dtype`.

        Raises:
            TypeError, ValueError: an argument is not as described, nothing has been written; ValueError names the row
                that is not finite.
        """
        source = _rows(rows)
        n, k = source.shape
        own = _ROW_DTYPES[source.dtype]
        dtype = own if dtype is None else dtype
        _choice(dtype, "dtype", tuple(_DTYPES))
        _choice(quant_type, "quant_type", _maps.QUANT_TYPES)
        _choice(blocksize, "blocksize", _BLOCKSIZES)
        values = _maps.four_bit_map(quant_type)
        workers = thread_count(threads)
        result = _out(out, (n, k), source)
        _only_nested(double_quant and scales is None, offset, nested_quant_map)
        if scales is not None:
            scales = array(scales, "scales", _F32, (-(-n * k // blocksize),))
        absmax = self.block_absmax(source, blocksize=blocksize, threads=workers)
        if scales is None:
            scales = absmax
            if double_quant:
                scales = self._unnest(*self._nest(absmax, offset, nested_quant_map, torch_threads, workers), workers)
        self._kernels.roundtrip_4bit(
            source, _DTYPES[own], n, k, absmax, scales, blocksize, values, _DTYPES[dtype], result, workers
        )
        return result

    def dequantize_int8(
        self,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
        *,
        dtype: str = "f32",
        threads: int = 0,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Turn LLM.int8 weights back: `bitsandbytes.functional.int8_vectorwise_dequant`, bit for bit.

        That is code * scb * (1/127), each product rounded to float32; transformers and PEFT dequantize with the same
        function and then cast to the dtype wanted.

        Args:
            codes: [n, k] int8, the saved `weight` (row layout, `weight_format` 0).
            scb: [n] float32, the saved `SCB`: the largest |weight| of each row.
            dtype: `f32`, `f16` or `bf16`: what the weights are rounded to, to nearest, ties to even.
            threads: how many threads; 0 is one per core.
            out: [n, k] float32 to write into, not overlapping an input; a new array if None.

        Returns:
            [n, k] float32; every value is one of `dtype`.

        Raises:
            TypeError, ValueError: an argument is not as described; nothing has been written.
        """
        _choice(dtype, "dtype", tuple(_DTYPES))
        source = array(codes, "codes", np.dtype(np.int8), (None, None))
        n, k = source.shape
        scales = array(scb, "scb", _F32, (n,))
        workers = thread_count(threads)
        result = _out(out, (n, k), source, scales)
        self._kernels.dequantize_int8(source, scales, n, k, _DTYPES[dtype], result, workers)
        return result
