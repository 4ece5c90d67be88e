"""`python -m edgetune.runtime.onnx.self_test`: a matrix product in 4 and in 8 bits by ONNX Runtime, and by numpy.

`edgetune doctor` starts it in a process of its own, as the test of llama.cpp: a library for another CPU takes its
process with it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune.runtime.onnx.operators import FIRST_RELEASE, available_operators
from edgetune.runtime.onnx.session import library, session_options

WIDTH, ROWS, BLOCK = 256, 64, 32
_IN_8_BITS = 4  # accuracy_level of MatMulNBits: activations are rounded to 8 bits


def product(x: NDArray[np.float32], coded: Any, bits: int) -> NDArray[np.float32]:
    """x @ weights.T with the weights in codes, through MatMulNBits."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = {name: array for name, array in coded._asdict().items() if array is not None}
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=WIDTH, N=ROWS, bits=bits, block_size=BLOCK,
        accuracy_level=_IN_8_BITS,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "self_test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), ROWS])],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = library().InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


def error(bits: int) -> float:
    """How far the product is from that of the same weights in f32, as a share of its size; the worst of all kernels.

    There is one for a single token and one for several, each with and without zero points.
    """
    return max(_error(bits, tokens, symmetric) for tokens in (1, 5) for symmetric in (True, False))


def _error(bits: int, tokens: int, symmetric: bool) -> float:
    random = np.random.default_rng(0)
    x, weights = (random.normal(size=(count, WIDTH)).astype(np.float32) for count in (tokens, ROWS))
    coded = edgetune_native.quantize_blocks(weights + 0.3, bits, block_size=BLOCK, symmetric=symmetric)
    exact = x @ edgetune_native.dequantize_blocks(*coded, bits=bits, block_size=BLOCK, k=WIDTH).T
    return float(np.linalg.norm(product(x, coded, bits) - exact) / np.linalg.norm(exact))


def run() -> dict[str, Any]:
    """`missing`: operators of exports that are not there; `errors`: bits -> share."""
    missing = {
        name: release for name, release in FIRST_RELEASE.items() if ("com.microsoft", name) not in available_operators()
    }
    errors = {str(bits): error(bits) for bits in (4, 8)}
    return {"version": library().__version__, "missing": missing, "errors": errors}


if __name__ == "__main__":
    print(json.dumps(run()))
