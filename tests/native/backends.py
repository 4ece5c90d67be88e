"""Both implementations of the kernels, each behind the public functions of edgetune_native."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import edgetune_native
from edgetune_native import _backend, _numpy
from edgetune_native._kernels import Kernels

native: Any = import_module("edgetune_native._native")
"""The C extension; `use_isa` is there for the tests."""


class Backend:
    """The public functions of edgetune_native over one implementation of the kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        function = getattr(edgetune_native, name)

        def call(*arguments: Any, **options: Any) -> Any:
            before, _backend.kernels = _backend.kernels, self._kernels
            try:
                return function(*arguments, **options)
            finally:
                _backend.kernels = before

        return call


COMPILED = Backend(cast(Kernels, native))
REFERENCE = Backend(_numpy)
