"""Sums of the squared inputs of every matrix while llama.cpp evaluates text: the figures of an importance matrix.

llama.cpp calls back for each operation of its graph; the inputs of matrix products with weights of the layers are added
up. The sums are those of `llama-imatrix` on the same tokens, in the same order in float32. Source: llama.cpp's
tools/imatrix/imatrix.cpp, and `struct ggml_tensor` of ggml.h.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem

F32 = NDArray[np.float32]
_DIMENSIONS, _PARAMETERS, _SOURCES, _NAME = 4, 16, 10, 64  # ggml.h: GGML_MAX_DIMS, _OP_PARAMS / 4, _SRC, _NAME
_F32 = 0  # enum ggml_type
_PRODUCT, _EXPERTS = b"MUL_MAT", b"MUL_MAT_ID"
_LAST_OPERATION = 64  # that is looked at; there are some hundred
_LAYERS = "blk."


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMENSIONS),
        ("nb", ctypes.c_size_t * _DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _PARAMETERS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _NAME),
    )

    def source(self, index: int) -> _Tensor:
        return _Tensor.from_address(self.src[index])

    def values(self, dtype: type[np.generic]) -> NDArray[Any]:
        """Return a view [ne3, ne2, ne1, ne0] of the data."""
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        size = (
            sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
        )
        memory = (ctypes.c_char * size).from_address(self.data)
        return np.ndarray(shape, dtype, memory, strides=strides)

    @property
    def weight_name(self) -> str:
        """The name of a weight; a copy of one is called DEVICE#name#number."""
        name = bytes(self.name).decode("utf-8", "replace")
        parts = name.split("#")
        return parts[1] if len(parts) > 1 else name


class ActivationSums(NamedTuple):
    """What was added up for one tensor.

    Attributes:
        sums: f32 [matrices, columns]: a tensor of experts has several matrices.
        counts: i64 [matrices]; one for all matrices that every token is multiplied by.
    """

    sums: F32
    counts: NDArray[np.int64]


class ActivationCollector:
    """Adds up the inputs of matrices; `callback` is the `cb_eval` of a llama_context.

    It runs Python inside llama_decode, where KeyboardInterrupt would be lost: call that outside of the main thread.
    """

    def __init__(self, llama_cpp: Any) -> None:
        """Find the operations that are looked at."""
        self._ggml = _declared(ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / _LIBRARY)))
        self._product, self._experts = _operations(self._ggml)
        self._is_checked = False
        self._error: Exception | None = None
        self.sums: dict[str, ActivationSums] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._handle)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise what went wrong in the callback, in place of llama.cpp's failure that follows from it."""
        try:
            yield
        except RuntimeProblem:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error

    def _handle(self, address: int, asks: bool, _: Any) -> bool:
        """Return whether llama.cpp shall show the result of an operation, then take its inputs; False ends the call."""
        try:
            tensor = _Tensor.from_address(address)
            if tensor.op not in (self._product, self._experts):
                return False
            if asks:
                return tensor.source(0).weight_name.startswith(_LAYERS) and tensor.source(1).type == _F32
            self._check(address, tensor)
            self._add(tensor)
        except Exception as error:  # noqa: BLE001  # none passes through llama.cpp; see `watching`
            self._error = error
            return False
        return True

    def _check(self, address: int, tensor: _Tensor) -> None:
        """Raise RuntimeProblem if the tensors of this libggml are laid out in another way."""
        if self._is_checked:
            return
        stated = (
            self._ggml.ggml_get_name(address), self._ggml.ggml_get_data(address), self._ggml.ggml_nelements(address),
        )  # fmt: skip
        if stated != (address + _Tensor.name.offset, tensor.data, int(np.prod(tensor.ne))):
            raise RuntimeProblem(
                "the installed llama.cpp lays its tensors out in another way than this edgetune knows",
                "Reinstall it: pip install --force-reinstall llama-cpp-python==0.3.36",
            )
        self._is_checked = True

    def _add(self, product: _Tensor) -> None:
        weight, inputs = product.source(0), product.source(1).values(np.float32)
        matrices, columns = int(weight.ne[2] * weight.ne[3]), inputs.shape[-1]
        by_expert = product.op == self._experts
        name = weight.weight_name
        if name not in self.sums:
            self.sums[name] = ActivationSums(
                np.zeros((matrices, columns), np.float32), np.zeros(matrices if by_expert else 1, np.int64)
            )
        sums, counts = self.sums[name]
        if by_expert:
            _add_by_expert(sums, counts, inputs[0], product.source(2).values(np.int32)[0, 0])
        else:
            for index, rows in enumerate(inputs.reshape(-1, *inputs.shape[2:])):
                _add_squares(sums[index % matrices], rows)
            counts += inputs.size // columns // matrices
        if not np.isfinite(sums).all():
            raise RuntimeProblem(f"the inputs of {name} are not all finite numbers", "Look for NaN in base and adapter")


def _add_squares(total: F32, rows: F32) -> None:
    """Add the squares of rows [n, columns] to a total [columns], one row after the other."""
    np.add.reduce(np.concatenate([total[None], np.square(rows)]), axis=0, out=total)


def _add_by_expert(sums: F32, counts: NDArray[np.int64], inputs: F32, experts: NDArray[np.int32]) -> None:
    """Add inputs [tokens, 1 or used, columns] to the sums of the experts [tokens, used] that take them."""
    for expert in np.unique(experts):
        used, tokens = np.nonzero(np.equal(experts.T, expert))
        _add_squares(sums[expert], inputs[tokens, used % inputs.shape[1]])
        counts[expert] += len(tokens)


_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


def _declared(ggml: Any) -> Any:
    ggml.ggml_op_name.restype = ctypes.c_char_p
    for name, returned in {
        "get_name": ctypes.c_void_p,
        "get_data": ctypes.c_void_p,
        "nelements": ctypes.c_int64,
    }.items():
        function = getattr(ggml, f"ggml_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], returned
    return ggml


def _operations(ggml: Any) -> tuple[int, int]:
    """Return the numbers of the two operations, which follow each other in `enum ggml_op`."""
    product = next(index for index in range(_LAST_OPERATION) if ggml.ggml_op_name(index) == _PRODUCT)
    if ggml.ggml_op_name(product + 1) != _EXPERTS:
        raise RuntimeProblem("the installed llama.cpp counts its operations in another way than this edgetune knows")
    return product, product + 1
