"""Stock programs of llama.cpp, built once from the pinned source distribution."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.validation import stock

BUILD = stock.ROOT / "build/llama-server/cmake"
_FOLDERS = {"llama-server": "server", "llama-bench": "llama-bench"}


def program(name: str) -> Path:
    """Return an executable: llama-server or llama-bench. Build it if it is not there, which takes minutes."""
    found = BUILD / _FOLDERS[name] / name
    if not found.is_file():
        spec = find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        cmake = str(Path(sys.executable).with_name("cmake"))
        options = [f"-DLLAMA_SOURCE={stock.source()}", f"-DLLAMA_LIBRARIES={Path(spec.origin).parent / 'lib'}"]
        subprocess.run([cmake, "-S", str(Path(__file__).parent), "-B", str(BUILD), *options], check=True)
        subprocess.run([cmake, "--build", str(BUILD), "--target", name, "-j", str(os.cpu_count())], check=True)
    return found
