"""Wrong arguments are refused with the value found and the value expected, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgetune_native.results import Comparison
from tests.native.backends import Backend, native

ROWS = np.ones((4, 512), np.float32)
LOGITS = np.zeros((4, 10), np.float32)
IDS = np.zeros(4, np.int64)


def quantize_with(**changes: Any) -> Callable[[Backend], object]:
    arguments = {"rows": ROWS, "type": "q4_k", **changes}
    return lambda backend: backend.quantize(**arguments)


def compare_with(**changes: Any) -> Callable[[Backend], object]:
    arguments = {"reference": LOGITS, "other": LOGITS, "targets": IDS, **changes}
    return lambda backend: backend.compare(**arguments)


def encode_with(logits: Any) -> Callable[[Backend], object]:
    return lambda backend: backend.encode_log_probs(logits)


READ_ONLY = np.zeros((4, 288), np.uint8)
READ_ONLY.flags.writeable = False

REFUSALS: list[tuple[Callable[[Backend], object], type[Exception], str]] = [
    (quantize_with(rows=ROWS.astype(np.float64)), TypeError, "rows has dtype float64, expected .*float32"),
    (quantize_with(rows=ROWS.astype(">f4")), TypeError, "rows has dtype >f4"),
    (quantize_with(rows=[[1.0]]), TypeError, "rows has type list"),
    (quantize_with(rows=ROWS[0]), ValueError, r"rows has shape \(512,\)"),
    (quantize_with(rows=ROWS[:, ::2]), ValueError, "rows is not C-contiguous"),
    (quantize_with(rows=ROWS.T), ValueError, "does not divide|not C-contiguous"),
    (quantize_with(rows=np.ones((4, 300), np.float32)), ValueError, "300 weights does not divide into blocks of 256"),
    (quantize_with(rows=np.ones((4, 0), np.float32)), ValueError, "0 weights"),
    (quantize_with(type="q9_k"), ValueError, "'q9_k' is unknown, expected one of f32, .*q4_k"),
    (quantize_with(type="Q4_K"), ValueError, "'Q4_K' is unknown"),
    (quantize_with(type=12), TypeError, "must be a name"),
    (quantize_with(weights=np.ones(511, np.float32)), ValueError, r"weights has shape \(511,\), expected \(512\)"),
    (quantize_with(weights=np.ones(512)), TypeError, "weights has dtype float64, expected float32"),
    (quantize_with(weights=np.full(512, np.nan, np.float32)), ValueError, r"weights\[0\] is nan"),
    (quantize_with(weights=np.full(512, -1, np.float32)), ValueError, r"weights\[0\] is -1.0"),
    (quantize_with(type="iq2_xs"), ValueError, "iq2_xs cannot be quantized without weights"),
    (quantize_with(threads=-1), ValueError, "threads is -1"),
    (quantize_with(threads=10**9), ValueError, "threads is 1000000000"),
    (quantize_with(threads=1.5), TypeError, "threads must be an int"),
    (quantize_with(threads=True), TypeError, "threads must be an int"),
    (quantize_with(out=np.zeros((4, 287), np.uint8)), ValueError, r"out has shape \(4, 287\), expected \(4, 288\)"),
    (quantize_with(out=np.zeros((4, 288), np.int8)), TypeError, "out has dtype int8, expected uint8"),
    (quantize_with(out=READ_ONLY), ValueError, "read-only"),
    (quantize_with(out=ROWS.view(np.uint8)[:, :288].copy().T.copy().T), ValueError, "out is not C-contiguous"),
    (
        lambda native: native.dequantize(np.zeros((2, 143), np.uint8), "q4_k", 256),
        ValueError,
        r"expected \(any, 144\)",
    ),
    (lambda native: native.dequantize(np.zeros((2, 144), np.int8), "q4_k", 256), TypeError, "blocks has dtype int8"),
    (lambda native: native.dequantize(np.zeros((2, 144), np.uint8), "q4_k", 255), ValueError, "blocks of 256"),
    (lambda backend: backend.row_bytes("q8_0", -32), ValueError, "-32 weights"),
    (compare_with(reference=LOGITS.astype(np.float64)), TypeError, "reference has dtype float64, expected .*float16"),
    (compare_with(other=LOGITS.astype(np.int16)), TypeError, "other has dtype int16"),
    (compare_with(other=[[0.0]]), TypeError, "other has type list"),
    (compare_with(top_k=0), ValueError, "top_k is 0, expected 1 or more"),
    (compare_with(top_k=2.0), TypeError, "top_k must be an int, not float"),
    (compare_with(top_k=True), TypeError, "top_k must be an int"),
    (compare_with(other=LOGITS[:, :9].copy()), ValueError, r"other has shape \(4, 9\), expected \(4, 10\)"),
    (compare_with(reference=LOGITS[:, :0].copy()), ValueError, "vocabulary is empty"),
    (compare_with(targets=IDS[:3]), ValueError, r"targets has shape \(3,\)"),
    (compare_with(targets=IDS + 10), ValueError, r"targets\[0\] is 10, expected 0 to 9"),
    (compare_with(targets=IDS - 1), ValueError, r"targets\[0\] is -1"),
    (compare_with(targets=IDS.astype(np.uint32)), TypeError, "targets has dtype uint32"),
    (compare_with(targets=[0, 0, 0, 0]), TypeError, "targets has type list"),
    (encode_with(LOGITS.astype(np.float64)), TypeError, "logits has dtype float64"),
    (
        lambda native: native.decode_log_probs(
            np.ones(3, np.float32), np.ones(4, np.float32), LOGITS.astype(np.uint16)
        ),
        ValueError,
        r"scale has shape \(3,\), expected \(4\)",
    ),
    (
        lambda native: native.decode_log_probs(np.ones(4, np.float32), np.ones(4, np.float32), LOGITS.astype(np.int16)),
        TypeError,
        "codes has dtype int16",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS)
def test_wrong_arguments_are_refused(
    backend: Backend, call: Callable[[Backend], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(backend)


def test_nothing_is_written(backend: Backend) -> None:
    out = np.full((4, 288), 7, np.uint8)
    for wrong in ({"weights": np.full(512, np.nan, np.float32)}, {"threads": -1}, {"rows": ROWS[:3]}):
        with pytest.raises(ValueError):
            quantize_with(out=out, **wrong)(backend)
    assert (out == 7).all()


def test_overlapping_output(backend: Backend) -> None:
    memory = np.zeros(4 * 512 * 4, np.uint8)
    rows = memory.view(np.float32).reshape(4, 512)
    with pytest.raises(ValueError, match="out overlaps an input"):
        backend.quantize(rows, "q4_k", out=memory[: 4 * 288].reshape(4, 288))


# The extension itself checks again what could corrupt memory.
F4 = np.ones(512, np.float32)
OUT = np.zeros(288, np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((F4[:511], 0, 12, 1, 512, None, OUT, 1), "rows holds 2044 bytes, expected 2048"),
        ((F4, 0, 12, 1, 512, None, OUT[:287], 1), "out holds 287 bytes, expected 288"),
        ((F4, 0, 12, 1, 512, F4[:5].copy(), OUT, 1), "weights holds 20 bytes, expected 2048"),
        ((F4, 7, 12, 1, 512, None, OUT, 1), "dtype 7"),
        ((F4, 0, 999, 1, 512, None, OUT, 1), "ggml type 999"),
        ((F4, 0, 9, 1, 512, None, OUT, 1), "ggml type 9 "),
        ((F4, 0, 17, 1, 512, None, OUT, 1), "without weights"),
        ((F4, 0, 12, 1, 500, None, OUT, 1), "whole number of blocks"),
        ((F4, 0, 12, 2**60, 512, None, OUT, 1), "are not a size"),
        ((F4, 0, 12, -1, 512, None, OUT, 1), "are not a size"),
        ((F4, 0, 12, 2**62, 2**40, None, OUT, 1), "are not a size"),
        ((np.frombuffer(bytes(2049), np.float32, offset=1, count=512), 0, 12, 1, 512, None, OUT, 1), "not aligned"),
    ],
)
def test_the_extension_checks_memory_again(compiled: Backend, arguments: tuple[Any, ...], message: str) -> None:
    compiled.ggml_library()
    with pytest.raises(ValueError, match=message):
        native.quantize(*arguments)
    assert not OUT.any()


def test_the_extension_refuses_objects_that_are_not_buffers(compiled: Backend) -> None:
    compiled.ggml_library()
    with pytest.raises(TypeError):
        native.quantize("rows", 0, 12, 1, 512, None, OUT, 1)
    with pytest.raises((BufferError, ValueError)):
        native.quantize(F4, 0, 12, 1, 512, None, READ_ONLY[0], 1)
    with pytest.raises((BufferError, ValueError)):
        native.quantize(np.ones(1024, np.float32)[::2], 0, 12, 1, 512, None, OUT, 1)


def test_the_extension_checks_compare_again(compiled: Backend) -> None:
    def call(targets: list[int], dtype: int = 0, k: int = 1, short: int = -1) -> None:
        outputs = tuple(np.empty(4 - (i == short), np.uint8 if i == 1 else np.float64) for i in range(8))
        native.compare(LOGITS, dtype, LOGITS, 0, np.array(targets), 4, 10, k, outputs, 1)

    with pytest.raises(ValueError, match="row 2: the target"):
        call([0, 9, 10, -1])
    for k in (0, 11, -1):
        with pytest.raises(ValueError, match=f"top_k is {k}, expected 1 to 10"):
            call([0, 0, 0, 0], k=k)
    with pytest.raises(ValueError, match="dtype 3"):
        call([0, 0, 0, 0], dtype=3)
    with pytest.raises(ValueError, match="reference holds 160 bytes, expected 80"):
        call([0, 0, 0, 0], dtype=1)
    for i in range(8):
        with pytest.raises(ValueError, match=f"{Comparison._fields[i]} holds"):
            call([0, 0, 0, 0], short=i)
