"""The storage types of GGUF: their names and sizes, quantization and dequantization."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import _backend, _library
from ._checks import Rows, array, importance_weights, output, stored_rows, thread_count
from .results import GgmlLibrary, GgmlType

__all__ = [
    "block_size",
    "dequantize",
    "ggml_library",
    "ggml_type_id",
    "quantize",
    "requires_weights",
    "row_bytes",
    "type_bytes",
    "types",
]


def ggml_library() -> GgmlLibrary:
    """Return path and version of libggml, which llama-cpp-python installs.

    Raises:
        ImportError: the library is missing, or its storage types are not those that edgetune knows.
    """
    return _open_once(_backend.kernels.open_ggml)


@functools.cache
def _open_once(open_ggml: Callable[[str], str]) -> GgmlLibrary:
    path = _library.ggml_path()
    return GgmlLibrary(path, open_ggml(path))


def _known_types() -> dict[str, GgmlType]:
    ggml_library()
    return _read_types(_backend.kernels.ggml_types)


@functools.cache
def _read_types(ggml_types: Callable[[], list[tuple[str, int, int, int, bool]]]) -> dict[str, GgmlType]:
    rows = [GgmlType._make(row) for row in ggml_types()]
    return {row.name.lower(): row._replace(name=row.name.lower()) for row in rows}


def _type(name: str) -> GgmlType:
    if not isinstance(name, str):
        raise TypeError(f"the type must be a name like 'q4_k', not {type(name).__name__}")
    known = _known_types()
    if name not in known:
        raise ValueError(f"type {name!r} is unknown, expected one of {', '.join(known)}")
    return known[name]


def types() -> tuple[str, ...]:
    """Return the names of all types that `quantize` can write, in lower case (`q4_k`)."""
    return tuple(_known_types())


def ggml_type_id(type: str) -> int:  # noqa: A002 - the word of the format
    """Return the id of a type as it stands in a GGUF file (`enum ggml_type`)."""
    return _type(type).id


def block_size(type: str) -> int:  # noqa: A002
    """Return the number of weights in a block of this type."""
    return _type(type).block_size


def type_bytes(type: str) -> int:  # noqa: A002
    """Return the size of a block of this type in bytes."""
    return _type(type).block_bytes


def requires_weights(type: str) -> bool:  # noqa: A002
    """Return whether `quantize` needs importance weights for this type."""
    return _type(type).requires_weights


def row_bytes(type: str, k: int) -> int:  # noqa: A002
    """Return the size of a row of `k` weights in bytes.

    Raises:
        ValueError: `k` is not a positive multiple of the block size.
    """
    row = _type(type)
    if k <= 0 or k % row.block_size:
        raise ValueError(f"a row of {k} weights does not divide into blocks of {row.block_size}, as {row.name} needs")
    return k // row.block_size * row.block_bytes


def quantize(
    rows: Rows,
    type: str,  # noqa: A002
    *,
    weights: NDArray[np.float32] | None = None,
    threads: int = 0,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Quantize rows of weights to blocks of a GGUF type.

    Args:
        rows: [n, k] float32, float16, or uint16 holding the bits of bfloat16. Not changed.
        type: the storage type, as GGUF spells it in lower case (`types()`).
        weights: [k] float32, the importance of each column (a row of an imatrix); finite and not negative.
        threads: number of threads; 0 means one per core. The bytes do not depend on it.
        out: [n, row_bytes(type, k)] uint8 to write into, not overlapping `rows`; None allocates it.

    Returns:
        [n, row_bytes(type, k)] uint8, byte for byte what `ggml_quantize_chunk` writes for the same rows in float32.

    Raises:
        TypeError: an argument has the wrong type or dtype. Nothing has been written.
        ValueError: an argument has the wrong value or shape; nothing has been written. Also if libggml cannot quantize
            a row (iq1 to iq3 with values that are not finite or extreme); the contents of `out` are then undefined.
    """
    kind = _type(type)
    source, dtype = stored_rows(rows)
    n, k = source.shape
    out = output(out, (n, row_bytes(type, k)), np.dtype(np.uint8), source)
    checked = importance_weights(weights, k)
    if checked is None and kind.requires_weights:
        raise ValueError(f"{kind.name} cannot be quantized without weights (an importance matrix)")
    _backend.kernels.quantize(source, dtype, kind.id, n, k, checked, out, thread_count(threads))
    return out


def dequantize(
    blocks: NDArray[np.uint8],
    type: str,  # noqa: A002
    k: int,
    *,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Dequantize blocks of a GGUF type.

    Args:
        blocks: [n, row_bytes(type, k)] uint8.
        type: the storage type, as GGUF spells it in lower case.
        k: weights per row.
        threads: number of threads; 0 means one per core.

    Returns:
        [n, k] float32, as libggml's `to_float` gives them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape.
    """
    kind = _type(type)
    source = array(blocks, "blocks", np.dtype(np.uint8), (None, row_bytes(type, k)))
    n = source.shape[0]
    out = np.empty((n, k), np.float32)
    _backend.kernels.dequantize(source, kind.id, n, k, out, thread_count(threads))
    return out
