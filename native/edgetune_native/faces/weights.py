"""Rows of weights to GGUF blocks and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune_native.results import GgmlType

from .checks import array, output, stored_rows, thread_count
from .types import TypesFace


class WeightsFace(TypesFace):
    """Quantization to GGUF types."""

    def quantize(
        self,
        rows: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
        type: str,  # noqa: A002
        *,
        weights: NDArray[np.float32] | None = None,
        threads: int = 0,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Quantize rows of weights into the blocks of a GGUF type.

        Args:
            rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16. Not changed.
            type: the storage type, as GGUF spells it in lower case (`types()`).
            weights: [k] float32, the importance of each column (an imatrix); finite and not negative.
            threads: how many threads; 0 is one per core. The bytes do not depend on it.
            out: [n, row_bytes(type, k)] uint8 to write into, not overlapping `rows`; a new array if None.

        Returns:
            [n, row_bytes(type, k)] uint8, byte for byte what `ggml_quantize_chunk` writes for the same rows in float32.

        Raises:
            TypeError, ValueError: an argument is not as described; nothing has been written. ValueError also if libggml
                cannot quantize a row (iq1 to iq3 with values that are not finite or extreme); `out` is then undefined.
        """
        kind = self._type(type)
        source, dtype = stored_rows(rows)
        n, k = source.shape
        out = output(out, (n, self.row_bytes(type, k)), source)
        checked = self._weights(weights, k, kind)
        self._kernels.quantize(source, dtype, kind.id, n, k, checked, out, thread_count(threads))
        return out

    @staticmethod
    def _weights(weights: object, k: int, kind: GgmlType) -> NDArray[np.float32] | None:
        if weights is None:
            if kind.requires_weights:
                raise ValueError(f"{kind.name} cannot be quantized without weights (an importance matrix)")
            return None
        checked: NDArray[np.float32] = array(weights, "weights", np.dtype(np.float32), (k,))
        wrong = np.flatnonzero(~(np.isfinite(checked) & (checked >= 0)))
        if wrong.size:
            raise ValueError(f"weights[{wrong[0]}] is {checked[wrong[0]]}, expected a finite number not below 0")
        return checked

    def dequantize(
        self,
        blocks: NDArray[np.uint8],
        type: str,  # noqa: A002
        k: int,
        *,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Turn blocks of a GGUF type back into weights.

        Args:
            blocks: [n, row_bytes(type, k)] uint8.
            type: the storage type, as GGUF spells it in lower case.
            k: weights per row.
            threads: how many threads; 0 is one per core.

        Returns:
            [n, k] float32, as libggml's `to_float` gives them.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        kind = self._type(type)
        source = array(blocks, "blocks", np.dtype(np.uint8), (None, self.row_bytes(type, k)))
        n = source.shape[0]
        out = np.empty((n, k), np.float32)
        self._kernels.dequantize(source, kind.id, n, k, out, thread_count(threads))
        return out
