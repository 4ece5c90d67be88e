"""Find libggml-base in the directory of the installed llama-cpp-python, without importing that package."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


@functools.cache
def ggml_path() -> str:
    """Return the path of libggml-base.

    Raises:
        ImportError: llama-cpp-python is not installed, or has no libggml-base.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "llama-cpp-python is not installed, and its libggml is needed to quantize: pip install llama-cpp-python"
        )
    path = Path(spec.submodule_search_locations[0]) / "lib" / _NAMES.get(sys.platform, "libggml-base.so")
    if not path.is_file():
        raise ImportError(f"{path} is missing: reinstall llama-cpp-python")
    return str(path)
