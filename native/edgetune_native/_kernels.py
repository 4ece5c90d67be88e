"""What both implementations offer: the C extension (`_native`) and the numpy twin (`_twin`).

Buffers are given as contiguous arrays of the stated type and size; the face has checked them. Outputs are written into.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Buffer = NDArray[Any]

F32, F16, BF16 = range(3)
"""The element types of rows to be quantized, as the kernels count them (`enum et_dtype`)."""


class Kernels(Protocol):
    """The low-level functions; `face.Face` checks what goes into them."""

    def open_ggml(self, path: str, /) -> str:
        """Open libggml-base and return its version."""
        ...

    def ggml_types(self) -> list[tuple[str, int, int, int, bool]]:
        """(name, id, block size, bytes per block, requires weights) of each type that can be quantized to."""
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

    def compare(
        self,
        reference: Buffer,
        other: Buffer,
        targets: Buffer,
        n: int,
        v: int,
        kld: Buffer,
        same_top: Buffer,
        nll_reference: Buffer,
        nll: Buffer,
        threads: int,
        /,
    ) -> None:
        """reference[n, v], other[n, v] f32, targets[n] i64 -> kld, nll_reference, nll [n] f64, same_top [n] u8."""
        ...

    def encode_log_probs(
        self, logits: Buffer, n: int, v: int, scale: Buffer, min_log_prob: Buffer, codes: Buffer, threads: int, /
    ) -> None:
        """logits[n, v] f32 -> scale[n], min_log_prob[n] f32, codes[n, v] u16."""
        ...

    def decode_log_probs(
        self, scale: Buffer, min_log_prob: Buffer, codes: Buffer, n: int, v: int, out: Buffer, threads: int, /
    ) -> None:
        """scale[n], min_log_prob[n] f32, codes[n, v] u16 -> out[n, v] f32."""
        ...

    def cpu(self) -> tuple[str, str, str]:
        """(isa, reason, features separated by spaces)."""
        ...

    def probe_amx(self, force: bool, /) -> tuple[bool, bool, str]:
        """(advertised, usable, reason)."""
        ...
