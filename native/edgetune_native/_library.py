"""Where libggml-base is: in the folder of the installed llama-cpp-python, which is found but not imported."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


@functools.cache
def ggml_path() -> str:
    """Return the path of libggml-base.

    Raises ImportError if llama-cpp-python is not installed or holds no libggml-base.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "llama-cpp-python is not installed; its libggml is what quantizes: pip install llama-cpp-python"
        )
    path = Path(spec.submodule_search_locations[0]) / "lib" / _NAMES.get(sys.platform, "libggml-base.so")
    if not path.is_file():
        raise ImportError(f"{path} is missing; install llama-cpp-python again")
    return str(path)
