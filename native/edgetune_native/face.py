"""The checked face over the kernels. `Face` holds one implementation; the package exports the methods of one `Face`.

Everything that could go wrong with an argument is found here, before a byte is written, and said with the value found
and the value expected. ValueError: a wrong value, length or shape. TypeError: a wrong type of array or number.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _kernels, _library
from .results import AmxProbe, Comparison, Cpu, GgmlLibrary, GgmlType, LogProbCodes

_ROW_DTYPES = {
    np.dtype(np.float32): _kernels.F32,
    np.dtype(np.float16): _kernels.F16,
    np.dtype(np.uint16): _kernels.BF16,
}


def _array(value: object, name: str, dtype: np.dtype[Any] | None, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return `value` if it is a contiguous array of that dtype and shape (None: any length); copied if unaligned."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, not {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")
    if value.ndim != len(shape) or any(want not in (None, have) for have, want in zip(value.shape, shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {value.shape}, expected ({expected})")
    if not value.flags.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous (strides {value.strides}); pass numpy.ascontiguousarray of it")
    return value if value.flags.aligned else value.copy()


def _threads(threads: object) -> int:
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads must be an int, not {type(threads).__name__}")
    if not 0 <= threads <= 4096:
        raise ValueError(f"threads is {threads}, expected 0 (one per core) to 4096")
    return int(threads)


def _output(out: object, shape: tuple[int, int], source: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the array to write into: the caller's, if it fits and does not overlap the source, or a new one."""
    if out is None:
        return np.empty(shape, np.uint8)
    checked = _array(out, "out", np.dtype(np.uint8), shape)
    if not checked.flags.writeable:
        raise ValueError("out is read-only")
    if np.may_share_memory(checked, source):
        raise ValueError("out overlaps rows")
    return checked


def _target_ids(targets: object, n: int, v: int) -> NDArray[np.int64]:
    if not isinstance(targets, np.ndarray) or targets.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        found = f"dtype {targets.dtype}" if isinstance(targets, np.ndarray) else f"type {type(targets).__name__}"
        raise TypeError(f"targets has {found}, expected a numpy array of int32 or int64")
    ids = np.ascontiguousarray(_array(targets, "targets", None, (n,)), np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= v))
    if outside.size:
        raise ValueError(f"targets[{outside[0]}] is {ids[outside[0]]}, expected 0 to {v - 1}")
    return ids


def _logits(value: object, name: str, shape: tuple[int | None, int | None] = (None, None)) -> NDArray[np.float32]:
    checked = _array(value, name, np.dtype(np.float32), shape)
    if checked.shape[1] == 0:
        raise ValueError(f"{name} has shape {checked.shape}: the vocabulary is empty")
    return checked


class Face:
    """The functions of the package over one implementation of the kernels."""

    def __init__(self, kernels: _kernels.Kernels) -> None:
        self._kernels = kernels

    # --- types ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _library(self) -> GgmlLibrary:
        path = _library.ggml_path()
        return GgmlLibrary(path, self._kernels.open_ggml(path))

    @functools.cached_property
    def _types(self) -> dict[str, GgmlType]:
        _ = self._library
        rows = map(GgmlType._make, self._kernels.ggml_types())
        return {row.name.lower(): row._replace(name=row.name.lower()) for row in rows}

    def _type(self, name: str) -> GgmlType:
        if not isinstance(name, str):
            raise TypeError(f"the type must be a name like 'q4_k', not {type(name).__name__}")
        if name not in self._types:
            raise ValueError(f"type {name!r} is not known; known are {', '.join(self._types)}")
        return self._types[name]

    def ggml_library(self) -> GgmlLibrary:
        """Return path and version of the libggml that quantizes: the one that llama-cpp-python installed.

        Raises ImportError if it is missing or does not fit the headers that edgetune was built with.
        """
        return self._library

    def types(self) -> tuple[str, ...]:
        """Return the names of all types that can be quantized to, lower case (`q4_k`)."""
        return tuple(self._types)

    def ggml_type_id(self, type: str) -> int:  # noqa: A002 - the word of the format
        """Return the number of a type as it stands in a GGUF file (`enum ggml_type`)."""
        return self._type(type).id

    def block_size(self, type: str) -> int:  # noqa: A002
        """Return how many weights a block of this type holds."""
        return self._type(type).block_size

    def type_bytes(self, type: str) -> int:  # noqa: A002
        """Return how many bytes a block of this type takes."""
        return self._type(type).block_bytes

    def requires_weights(self, type: str) -> bool:  # noqa: A002
        """Return whether this type cannot be quantized to without importance weights."""
        return self._type(type).requires_weights

    def row_bytes(self, type: str, k: int) -> int:  # noqa: A002
        """Return how many bytes a row of `k` weights takes.

        Raises ValueError, naming the block size, if `k` is not a positive multiple of it.
        """
        row = self._type(type)
        if k <= 0 or k % row.block_size:
            raise ValueError(
                f"a row of {k} weights does not divide into blocks of {row.block_size}, as {row.name} needs"
            )
        return k // row.block_size * row.block_bytes

    # --- weights -------------------------------------------------------------------------------------------------

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
        if not isinstance(rows, np.ndarray) or rows.dtype not in _ROW_DTYPES:
            found = f"dtype {rows.dtype}" if isinstance(rows, np.ndarray) else f"type {rows.__class__.__name__}"
            raise TypeError(f"rows has {found}, expected a numpy array of float32, float16 or uint16 (bfloat16 bits)")
        source = _array(rows, "rows", None, (None, None))
        n, k = source.shape
        out = _output(out, (n, self.row_bytes(type, k)), source)
        checked = self._weights(weights, k, kind)
        self._kernels.quantize(source, _ROW_DTYPES[source.dtype], kind.id, n, k, checked, out, _threads(threads))
        return out

    @staticmethod
    def _weights(weights: object, k: int, kind: GgmlType) -> NDArray[np.float32] | None:
        if weights is None:
            if kind.requires_weights:
                raise ValueError(f"{kind.name} cannot be quantized without weights (an importance matrix)")
            return None
        checked: NDArray[np.float32] = _array(weights, "weights", np.dtype(np.float32), (k,))
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
        source = _array(blocks, "blocks", np.dtype(np.uint8), (None, self.row_bytes(type, k)))
        n = source.shape[0]
        out = np.empty((n, k), np.float32)
        self._kernels.dequantize(source, kind.id, n, k, out, _threads(threads))
        return out

    # --- logits --------------------------------------------------------------------------------------------------

    def compare(
        self,
        reference: NDArray[np.float32],
        other: NDArray[np.float32],
        targets: NDArray[np.int32] | NDArray[np.int64],
        *,
        threads: int = 0,
    ) -> Comparison:
        """Compare two models' outputs, row by row.

        Log-softmax is applied inside, so a row may be logits or log-probabilities. -inf is allowed: in the reference it
        contributes nothing, in the other it makes the divergence +inf where the reference has mass. A probability below
        exp(-708) times the largest of its row counts as none.

        Args:
            reference: [n, v] float32.
            other: [n, v] float32.
            targets: [n] int32 or int64, the token that came next, 0 to v - 1.
            threads: how many threads; 0 is one per core. The numbers do not depend on it.

        Returns:
            A `Comparison` of arrays of length n, in nats, added up in double (relative error of a sum below 1e-13).

        Raises:
            TypeError, ValueError: an argument is not as described, or a row holds a NaN or +inf or no finite logit.
        """
        a = _logits(reference, "reference")
        n, v = a.shape
        b = _logits(other, "other", (n, v))
        ids = _target_ids(targets, n, v)
        kld, nll_reference, nll = np.empty(n), np.empty(n), np.empty(n)
        same_top = np.empty(n, np.bool_)
        self._kernels.compare(a, b, ids, n, v, kld, same_top.view(np.uint8), nll_reference, nll, _threads(threads))
        return Comparison(kld, same_top, nll_reference, nll)

    def encode_log_probs(self, logits: NDArray[np.float32], *, threads: int = 0) -> LogProbCodes:
        """Store rows of log-probabilities in 16 bits, as llama.cpp's `--kl-divergence-base` file does.

        Args:
            logits: [n, v] float32, logits or log-probabilities; -inf is allowed.
            threads: how many threads; 0 is one per core. The bits do not depend on it.

        Returns:
            `LogProbCodes`: scale [n], min_log_prob [n], codes [n, v]. What is more than 16 nats below the largest is
            stored as exactly 16 nats below.

        Raises:
            TypeError, ValueError: not as described, or a row holds a NaN or +inf or no finite logit.
        """
        rows = _logits(logits, "logits")
        n, v = rows.shape
        result = LogProbCodes(np.empty(n, np.float32), np.empty(n, np.float32), np.empty((n, v), np.uint16))
        self._kernels.encode_log_probs(rows, n, v, *result, _threads(threads))
        return result

    def decode_log_probs(
        self,
        scale: NDArray[np.float32],
        min_log_prob: NDArray[np.float32],
        codes: NDArray[np.uint16],
        *,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Return log-probabilities [n, v] float32 of rows that `encode_log_probs` stored.

        Args:
            scale: [n] float32, nats per step.
            min_log_prob: [n] float32, what code 0 stands for.
            codes: [n, v] uint16.
            threads: how many threads; 0 is one per core.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        stored = _array(codes, "codes", np.dtype(np.uint16), (None, None))
        n, v = stored.shape
        steps = _array(scale, "scale", np.dtype(np.float32), (n,))
        low = _array(min_log_prob, "min_log_prob", np.dtype(np.float32), (n,))
        out = np.empty((n, v), np.float32)
        self._kernels.decode_log_probs(steps, low, stored, n, v, out, _threads(threads))
        return out

    # --- the machine ---------------------------------------------------------------------------------------------

    def cpu(self) -> Cpu:
        """Return the instruction set in use, why it was chosen, and what the CPU offers."""
        isa, reason, features = self._kernels.cpu()
        return Cpu(isa, reason, tuple(features.split()))

    def probe_amx(self) -> AmxProbe:
        """Return whether AMX works here: tried once, in a child process, because a fault would kill this one."""
        return self._amx

    @functools.cached_property
    def _amx(self) -> AmxProbe:
        return AmxProbe(*self._kernels.probe_amx(False))
