"""The implementation of the kernels that the public functions call: the C extension, or the NumPy reference backend."""

from __future__ import annotations

import os
from importlib import import_module
from typing import cast

from ._kernels import Kernels


def load() -> Kernels:
    """Return the C extension, or the NumPy reference backend if the environment variable EDGETUNE_PURE is 1."""
    if os.environ.get("EDGETUNE_PURE") == "1":
        from . import _numpy

        return _numpy
    # An extension has no types to check; tests/native/test_kernels.py compares its functions with `Kernels`.
    return cast(Kernels, import_module("edgetune_native._native"))


kernels: Kernels = load()
"""The backend in use. Tests replace it."""
