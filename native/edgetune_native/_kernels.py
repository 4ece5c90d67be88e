"""The interface of the kernels, which the C extension (`_native`) and the NumPy reference backend (`_numpy`) implement.

Inputs and outputs are contiguous arrays of the stated dtype and shape, which the public functions have checked. A
kernel writes its result into the output arrays. Parameters are positional; their names are those of the C functions.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Buffer = NDArray[Any]

F32, F16, BF16 = range(3)
"""The element types of rows, as the kernels number them (`enum et_dtype`)."""


class Kernels(Protocol):
    """The functions of a backend. `threads`: 0 means one per core; the reference backend ignores it."""

    def open_ggml(self, path: str, /) -> str:
        """Open libggml-base and return its version."""
        ...

    def ggml_types(self) -> list[tuple[str, int, int, int, bool]]:
        """Return (name, id, block size, bytes per block, requires weights) of each type that can be quantized to."""
        ...

    def quantize(
        self,
        rows: Buffer,
        dtype: int,
        type_id: int,
        n: int,
        k: int,
        weights: Buffer | None,
        out: Buffer,
        threads: int,
        /,
    ) -> None:
        """rows[n, k] -> out[n, row bytes]."""
        ...

    def dequantize(self, blocks: Buffer, type_id: int, n: int, k: int, out: Buffer, threads: int, /) -> None:
        """blocks[n, row bytes] -> out[n, k] f32."""
        ...

    def add_product(
        self,
        rows: Buffer,
        dtype: int,
        left: Buffer,
        right: Buffer,
        n: int,
        r: int,
        k: int,
        out: Buffer,
        threads: int,
        /,
    ) -> None:
        """rows[n, k] + left[n, r] @ right[r, k] f32 -> out[n, k] f32."""
        ...

    def compare(
        self,
        reference: Buffer,
        reference_dtype: int,
        other: Buffer,
        other_dtype: int,
        targets: Buffer,
        n: int,
        v: int,
        top_k: int,
        outputs: tuple[Buffer, ...],
        threads: int,
        /,
    ) -> None:
        """reference[n, v], other[n, v], targets[n] i64 -> the fields of `Comparison` in order: f64[n], same_top u8."""
        ...

    def encode_log_probs(
        self,
        logits: Buffer,
        dtype: int,
        n: int,
        v: int,
        scale: Buffer,
        min_log_prob: Buffer,
        codes: Buffer,
        threads: int,
        /,
    ) -> None:
        """logits[n, v] -> scale[n], min_log_prob[n] f32, codes[n, v] u16."""
        ...

    def decode_log_probs(
        self, scale: Buffer, min_log_prob: Buffer, codes: Buffer, n: int, v: int, out: Buffer, threads: int, /
    ) -> None:
        """scale[n], min_log_prob[n] f32, codes[n, v] u16 -> out[n, v] f32."""
        ...

    def quantize_blocks(
        self,
        rows: Buffer,
        dtype: int,
        n: int,
        k: int,
        weights: Buffer | None,
        bits: int,
        block_size: int,
        symmetric: bool,
        search: bool,
        half_scales: bool,
        codes: Buffer,
        scales: Buffer,
        zero_points: Buffer | None,
        threads: int,
        /,
    ) -> None:
        """rows[n, k] -> codes[n, k_blocks, block bytes], scales[n, k_blocks] f32 or f16, zero_points[n, packed] u8."""
        ...

    def dequantize_blocks(
        self,
        codes: Buffer,
        scales: Buffer,
        half_scales: bool,
        zero_points: Buffer | None,
        bits: int,
        block_size: int,
        n: int,
        k: int,
        out: Buffer,
        threads: int,
        /,
    ) -> None:
        """codes, scales, zero_points -> out[n, k] f32."""
        ...

    def absmax_4bit(
        self, rows: Buffer, dtype: int, n: int, k: int, blocksize: int, absmax: Buffer, threads: int, /
    ) -> None:
        """rows[n, k] -> absmax[blocks] f32."""
        ...

    def torch_mean(self, values: Buffer, count: int, torch_threads: int, /) -> float:
        """Return the f32 mean of values[count] f32, added in PyTorch's order on that many threads."""
        ...

    def nest_absmax(
        self,
        absmax: Buffer,
        count: int,
        offset: float,
        nearest: Buffer,
        blocksize: int,
        codes: Buffer,
        nested_absmax: Buffer,
        threads: int,
        /,
    ) -> None:
        """absmax[count] f32, nearest[65536] u8 -> codes[count] u8, nested_absmax[nested blocks] f32."""
        ...

    def unnest_absmax(
        self,
        codes: Buffer,
        count: int,
        quant_map: Buffer,
        nested_absmax: Buffer,
        blocksize: int,
        offset: float,
        absmax: Buffer,
        threads: int,
        /,
    ) -> None:
        """codes[count] u8, quant_map[256] f32, nested_absmax[nested blocks] f32 -> absmax[count] f32."""
        ...

    def quantize_4bit(
        self,
        rows: Buffer,
        dtype: int,
        n: int,
        k: int,
        absmax: Buffer,
        blocksize: int,
        values: Buffer,
        packed: Buffer,
        threads: int,
        /,
    ) -> None:
        """rows[n, k], absmax[blocks] f32, values[16] f32 -> packed[ceil(n k / 2)] u8."""
        ...

    def dequantize_4bit(
        self,
        packed: Buffer,
        count: int,
        absmax: Buffer,
        blocksize: int,
        values: Buffer,
        dtype: int,
        out: Buffer,
        threads: int,
        /,
    ) -> None:
        """packed[ceil(count / 2)] u8, absmax[blocks] f32, values[16] f32 -> out[count] f32, rounded to dtype."""
        ...

    def roundtrip_4bit(
        self,
        rows: Buffer,
        dtype: int,
        n: int,
        k: int,
        absmax: Buffer,
        scales: Buffer,
        blocksize: int,
        values: Buffer,
        to: int,
        out: Buffer,
        threads: int,
        /,
    ) -> None:
        """quantize_4bit with absmax, then dequantize_4bit with scales: rows[n, k] -> out[n, k] f32, rounded to `to`."""
        ...

    def dequantize_int8(
        self, codes: Buffer, scb: Buffer, n: int, k: int, dtype: int, out: Buffer, threads: int, /
    ) -> None:
        """codes[n, k] i8, scb[n] f32 -> out[n, k] f32, rounded to dtype."""
        ...

    def cpu(self) -> tuple[str, str, str]:
        """Return (instruction set, reason, features separated by spaces)."""
        ...

    def probe_amx(self, force: bool, /) -> tuple[bool, bool, str]:
        """Return (advertised, usable, reason)."""
        ...
