"""The storage types of GGUF, as the libggml at hand has them."""

from __future__ import annotations

import functools

from edgetune_native import _kernels, _library
from edgetune_native.results import GgmlLibrary, GgmlType


class TypesFace:
    """Names, numbers and sizes of the storage types."""

    def __init__(self, kernels: _kernels.Kernels) -> None:
        self._kernels = kernels

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
