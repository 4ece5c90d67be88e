"""The declarations of native/src/llama_abi.h, and what the loop over libllama refuses.

What it generates is compared in tests/runtime; `make test-c` runs it under sanitizers (native/tests/test_llama.c).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import edgetune_native
from tests.native.backends import native

ROOT = Path(__file__).parents[2] / "native"


def test_declarations_are_those_of_the_installed_header(tmp_path: Path) -> None:
    headers = Path(llama_cpp.__file__).parents[1] / "include"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not (headers / "llama.h").is_file():
        pytest.skip("no C compiler, or llama-cpp-python is installed without headers")
    command = [compiler, "-std=c11", "-fsyntax-only", "-Werror", f"-I{ROOT / 'src'}", "-isystem", str(headers)]
    source = (ROOT / "tests/test_llama_abi.c").read_text(encoding="utf-8")
    (tmp_path / "abi.c").write_text(source, encoding="utf-8")
    subprocess.run([*command, str(tmp_path / "abi.c")], check=True)
    changed = (ROOT / "src/llama_abi.h").read_text(encoding="utf-8").replace("int32_t *pos;", "int64_t *pos;")
    (tmp_path / "llama_abi.h").write_text(changed, encoding="utf-8")
    found = subprocess.run([*command, str(tmp_path / "abi.c")], check=False, capture_output=True, text=True)
    assert "struct llama_batch: pos" in found.stderr


def test_a_library_without_the_functions_is_refused(tmp_path: Path) -> None:
    """In a process that has opened libllama, the path is not looked at again; so in a new one."""
    code = f"import edgetune_native._native as n; n.llama_open({edgetune_native.ggml_library().path!r})"
    import sys

    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "it has no function llama_decode" in found.stderr


def test_numbers_that_do_not_fit_are_refused() -> None:
    for sizes in (
        (0, 10, 0, 8, 4, 5),
        (2, 0, 0, 8, 4, 5),
        (9, 10, 0, 8, 4, 5),
        (2, 10, -1, 8, 4, 5),
        (2, 10, 0, 8, 4, 0),
    ):
        with pytest.raises(ValueError, match="not possible"):
            native.llama_new(0, 0, 0, *sizes, False)
    with pytest.raises((TypeError, ValueError)):
        native.llama_turn(np.zeros(3))
