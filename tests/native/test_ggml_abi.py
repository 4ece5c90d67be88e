"""The declarations of native/src/ggml_abi.h against the installed library and, if installed, its headers."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

import edgetune_native

ROOT = Path(__file__).parents[2]
DECLARED = {
    name: int(number)
    for name, number in re.findall(
        r"X\((\w+), (\d+)\)", (ROOT / "native/src/ggml_abi.h").read_text(encoding="utf-8").replace("X(name, id)", "")
    )
}


def test_ids_are_those_of_the_library() -> None:
    library = ctypes.CDLL(edgetune_native.ggml_library().path)
    library.ggml_type_name.restype = ctypes.c_char_p
    assert len(DECLARED) == len(edgetune_native.types())
    assert {library.ggml_type_name(number).decode().upper(): number for number in DECLARED.values()} == DECLARED


def test_ids_are_those_of_the_headers() -> None:
    """`make test-c` compares the functions and structures too, with a compiler (native/tests/test_ggml_abi.c)."""
    header = Path(edgetune_native.ggml_library().path).parents[2] / "include/ggml.h"
    if not header.is_file():
        pytest.skip("llama-cpp-python is installed without headers")
    found = dict(re.findall(r"\bGGML_TYPE_(\w+)\s*=\s*(\d+)", header.read_text(encoding="utf-8")))
    assert {name: int(found[name]) for name in DECLARED} == DECLARED
