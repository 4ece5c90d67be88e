"""The self-test's model runs, and is quantized as well as it should be."""

from __future__ import annotations

from edgetune.diagnosis import KLD_LIMIT
from edgetune.runtime.self_test import run


def test_the_test_model_runs() -> None:
    found = run()
    assert found["q8_0"] < 0.001
    assert 0.001 < found["q4_k"] < KLD_LIMIT / 3
