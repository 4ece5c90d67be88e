"""The self-test's model runs, and is quantized as well as it should be."""

from __future__ import annotations

from edgetune.inspect.doctor import KLD_LIMIT, NBITS_LIMIT
from edgetune.runtime.llama.self_test import run
from edgetune.runtime.onnx import self_test as onnx_self_test


def test_the_model_of_the_self_test_runs() -> None:
    found = run()
    assert found["q8_0"] < 0.001
    assert 0.001 < found["q4_k"] < KLD_LIMIT / 3


def test_the_quantized_products_are_those_of_numpy() -> None:
    found = onnx_self_test.run()
    assert found["missing"] == {}
    for error in found["errors"].values():
        assert 0 < error < NBITS_LIMIT / 3
