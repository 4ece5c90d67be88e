"""The C extension and the NumPy reference backend implement `Kernels`: the same functions with the same parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from edgetune_native import _numpy
from edgetune_native._kernels import Kernels
from tests.native.backends import COMPILED, native

KERNELS = {name: inspect.signature(function) for name, function in vars(Kernels).items() if not name.startswith("_")}
FOR_TESTS = {"use_isa"}
LLAMA = {name for name in vars(native) if name.startswith("llama_")}
"""The loop over libllama, which is no kernel: tests/native/test_llama_slots.py."""


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_extension_has_exactly_these_functions() -> None:
    assert {name for name in vars(native) if not name.startswith("_")} == {*KERNELS, *FOR_TESTS, *LLAMA}


@pytest.mark.parametrize("name", KERNELS)
def test_parameters_are_those_of_the_protocol(name: str) -> None:
    expected = list(KERNELS[name].parameters)[1:]  # without self
    assert parameters(getattr(native, name)) == expected
    assert parameters(getattr(_numpy, name)) == expected
    with pytest.raises(TypeError, match=rf"(exactly|takes) ({len(expected)}|no) argument"):  # what C really parses
        getattr(native, name)(*[None] * (len(expected) + 1))


def test_both_backends_read_the_same_types() -> None:
    COMPILED.ggml_library()
    assert _numpy.open_ggml(COMPILED.ggml_library().path) == COMPILED.ggml_library().version
    assert _numpy.ggml_types() == native.ggml_types()
