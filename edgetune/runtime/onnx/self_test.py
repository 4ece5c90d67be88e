"""`python -m edgetune.runtime.onnx.self_test`: compare 4-bit and 8-bit products of ONNX Runtime and NumPy.

`edgetune doctor` runs it in a process of its own: a library that was built for another CPU crashes its process.
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


def multiply(x: NDArray[np.float32], quantized: Any, bits: int) -> NDArray[np.float32]:
    """Return x @ weights.T for quantized weights, computed by MatMulNBits."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = {name: array for name, array in quantized._asdict().items() if array is not None}
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
    """Return the relative error of the product against f32 with the same weights: the largest of all four kernels.

    There is a kernel for one token and one for several, each with and without zero points.
    """
    return max(_error(bits, tokens, symmetric) for tokens in (1, 5) for symmetric in (True, False))


def _error(bits: int, tokens: int, symmetric: bool) -> float:
    random = np.random.default_rng(0)
    x, weights = (random.normal(size=(count, WIDTH)).astype(np.float32) for count in (tokens, ROWS))
    quantized = edgetune_native.quantize_blocks(weights + 0.3, bits, block_size=BLOCK, symmetric=symmetric)
    exact = x @ edgetune_native.dequantize_blocks(*quantized, bits=bits, block_size=BLOCK, k=WIDTH).T
    return float(np.linalg.norm(multiply(x, quantized, bits) - exact) / np.linalg.norm(exact))


def run() -> dict[str, Any]:
    """Return `missing`: operators of exports that this build lacks; `errors`: bits -> relative error."""
    missing = {
        name: release for name, release in FIRST_RELEASE.items() if ("com.microsoft", name) not in available_operators()
    }
    errors = {str(bits): error(bits) for bits in (4, 8)}
    return {"version": library().__version__, "missing": missing, "errors": errors}


if __name__ == "__main__":
    print(json.dumps(run()))
