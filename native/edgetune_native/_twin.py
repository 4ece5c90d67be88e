"""The numpy twin of the C extension (`EDGETUNE_PURE=1`): the same functions without compiled code of ours.

Quantizing and dequantizing call the same libggml through ctypes, one thread, so the bytes are the same; the types on
which libggml may stop the process run in a child process. The comparison and the 16-bit codes are written in numpy from
their formulas. `threads` is accepted and has no effect.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._kernels import BF16, F16, F32, Buffer

# The types that ggml_quantize_chunk of the pinned version writes; it stops the process on any other (ggml_bridge.c).
_QUANTIZABLE = (0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 21, 18, 22, 17, 16, 29, 19, 34, 35, 39, 40, 41, 42)

# iq3_s, iq3_xxs, iq2_s, iq2_xs, iq2_xxs, iq1_m, iq1_s: on extreme rows libggml fails an assertion and calls abort().
_MAY_ABORT = frozenset((21, 18, 22, 17, 16, 29, 19))

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


class _Ggml:
    """libggml-base with the signatures of ggml.h."""

    def __init__(self, path: str) -> None:
        self.path = path
        library = ctypes.CDLL(path)
        self.version = library.ggml_version
        self.version.restype = ctypes.c_char_p
        self.requires_imatrix = library.ggml_quantize_requires_imatrix
        self.requires_imatrix.restype = ctypes.c_bool
        self._traits = library.ggml_get_type_traits
        self._traits.restype = ctypes.POINTER(_Traits)
        self.quantize_chunk = library.ggml_quantize_chunk
        self.quantize_chunk.restype = ctypes.c_size_t
        self.quantize_chunk.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )

    def traits(self, type_id: int) -> _Traits:
        traits: _Traits = self._traits(type_id).contents
        return traits


_ggml: _Ggml | None = None


def _library() -> _Ggml:
    if _ggml is None:
        raise RuntimeError("open_ggml has not been called")
    return _ggml


def open_ggml(path: str, /) -> str:
    """Open libggml-base and return its version."""
    global _ggml
    if _ggml is None:
        try:
            _ggml = _Ggml(path)
        except (OSError, AttributeError) as error:
            raise ImportError(f"{path} could not be used: {error}") from error
    version: bytes = _ggml.version()
    return version.decode()


def ggml_types() -> list[tuple[str, int, int, int, bool]]:
    """(name, id, block size, bytes per block, requires weights) of each type that can be quantized to."""
    library = _library()
    rows = []
    for type_id in _QUANTIZABLE:
        traits = library.traits(type_id)
        rows.append(
            (traits.type_name.decode(), type_id, traits.blck_size, traits.type_size, library.requires_imatrix(type_id))
        )
    return rows


# --- weights ---------------------------------------------------------------------------------------------------------


def _widen(rows: Buffer, dtype: int) -> NDArray[np.float32]:
    if dtype == F32:
        return rows
    if dtype == F16:
        return rows.astype(np.float32)
    assert dtype == BF16
    return (rows.astype(np.uint32) << 16).view(np.float32)


def quantize(
    rows: Buffer, dtype: int, type_id: int, n: int, k: int, weights: Buffer | None, out: Buffer, threads: int, /
) -> None:
    """rows[n, k] -> out[n, row bytes]."""
    wide = _widen(rows, dtype)
    if type_id in _MAY_ABORT:
        _quantize_in_child(wide, type_id, weights, out)
        return
    importance = None if weights is None else weights.ctypes.data
    written = _library().quantize_chunk(type_id, wide.ctypes.data, out.ctypes.data, 0, n, k, importance)
    if written != out.nbytes:
        raise RuntimeError("libggml wrote another number of bytes than its row size promises")


# Row by row, so that the number of rows that come back tells which one libggml stopped at. What libggml itself prints
# on the way (to stdout) is sent to nowhere.
_CHILD = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, type_id, n, k, row_bytes, weighted = sys.argv[1], *map(int, sys.argv[2:])
answer = os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
chunk = ctypes.CDLL(path).ggml_quantize_chunk
chunk.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_char_p]
weights = sys.stdin.buffer.read(4 * k) if weighted else None
out = ctypes.create_string_buffer(row_bytes)
for row in range(n):
    chunk(type_id, sys.stdin.buffer.read(4 * k), out, 0, 1, k, weights)
    answer.write(out.raw)
    answer.flush()
"""


def _quantize_in_child(rows: NDArray[np.float32], type_id: int, weights: Buffer | None, out: Buffer) -> None:
    """Quantize rows[n, k] into out[n, row bytes] in a child process, which libggml may kill."""
    n, k = rows.shape
    numbers = (type_id, n, k, out.shape[1], int(weights is not None))
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, _library().path, *map(str, numbers)],
        input=(b"" if weights is None else weights.tobytes()) + rows.tobytes(),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if len(child.stdout) < out.nbytes:
        row = len(child.stdout) // out.shape[1]
        raise ValueError(
            f"libggml cannot quantize row {row} to this type: its values are not finite, or too large or too small"
        )
    out[...] = np.frombuffer(child.stdout, np.uint8).reshape(out.shape)


def dequantize(blocks: Buffer, type_id: int, n: int, k: int, out: Buffer, threads: int, /) -> None:
    """blocks[n, row bytes] -> out[n, k] f32."""
    to_float = _library().traits(type_id).to_float
    if not to_float:  # f32 has no converter: it is one
        out[...] = blocks.view(np.float32) if n else 0
        return
    for row in range(n):
        to_float(blocks[row].ctypes.data, out[row].ctypes.data, k)


# --- logits ----------------------------------------------------------------------------------------------------------


def _check_logits(rows: Buffer) -> None:
    """Raise for the first row that is no distribution."""
    top = rows.max(axis=1)  # NaN if the row has one
    for row in np.flatnonzero(~np.isfinite(top)):
        if top[row] == -np.inf:
            raise ValueError(f"row {row} has no finite logit, so it is no distribution")
        raise ValueError(f"row {row} holds a NaN or +inf, which is no logit")


def _shifted(rows: Buffer) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    shifted: NDArray[np.float64] = wide - wide.max(axis=1, keepdims=True)
    return shifted


def _mass(shifted: NDArray[Any]) -> NDArray[np.float64]:
    mass: NDArray[np.float64] = np.where(shifted > -708.0, np.exp(np.maximum(shifted, -708.0)), 0.0)
    return mass


def compare(
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
    if n == 0:
        return
    _check_logits(reference)
    _check_logits(other)
    a, b = _shifted(reference), _shifted(other)
    mass = _mass(a)
    sum_a, sum_b = mass.sum(axis=1), _mass(b).sum(axis=1)
    some = mass > 0.0
    difference = np.subtract(a, b, out=np.zeros_like(a), where=some)
    cross = np.multiply(mass, difference, out=difference, where=some).sum(axis=1)
    kld[...] = np.maximum(cross / sum_a - (np.log(sum_a) - np.log(sum_b)), 0.0)
    same_top[...] = reference.argmax(axis=1) == other.argmax(axis=1)
    rows = np.arange(n)
    nll_reference[...] = np.log(sum_a) - a[rows, targets]
    nll[...] = np.log(sum_b) - b[rows, targets]


def encode_log_probs(
    logits: Buffer, n: int, v: int, scale: Buffer, min_log_prob: Buffer, codes: Buffer, threads: int, /
) -> None:
    """logits[n, v] f32 -> scale[n], min_log_prob[n] f32, codes[n, v] u16."""
    if n == 0:
        return
    _check_logits(logits)
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - np.float32(16))
    terms = _mass((logits - top).astype(np.float64)).astype(np.float32)
    log_sum = np.log(terms.sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    step = (top - low) / np.float32(65535)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / step
    usable = np.isfinite(inverse)
    inverse = np.where(usable, inverse, np.float32(0))
    above = np.where(logits > low, logits - low, np.float32(0))
    codes[...] = np.rint(inverse * above).astype(np.uint16)
    scale[...] = np.where(usable, step, np.float32(0))[:, 0]
    min_log_prob[...] = (low - top - log_sum)[:, 0]


def decode_log_probs(
    scale: Buffer, min_log_prob: Buffer, codes: Buffer, n: int, v: int, out: Buffer, threads: int, /
) -> None:
    """scale[n], min_log_prob[n] f32, codes[n, v] u16 -> out[n, v] f32."""
    np.multiply(scale[:, None], codes.astype(np.float32), out=out)
    np.add(out, min_log_prob[:, None], out=out)


# --- the machine -----------------------------------------------------------------------------------------------------


def cpu() -> tuple[str, str, str]:
    """(isa, reason, features separated by spaces)."""
    reason = "EDGETUNE_PURE=1 asks for the numpy twin" if os.environ.get("EDGETUNE_PURE") == "1" else "the numpy twin"
    return "numpy", reason, ""


def probe_amx(force: bool, /) -> tuple[bool, bool, str]:
    """(advertised, usable, reason); without compiled code nothing can be tried, so an advertisement is not trusted."""
    try:
        advertised = "amx_int8" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False, False, "not applicable: AMX exists on x86-64 and is looked for on Linux"
    if advertised:
        return True, False, "the CPU advertises AMX; the numpy twin cannot try it, so it counts as unusable"
    return False, False, "this CPU does not advertise AMX"
