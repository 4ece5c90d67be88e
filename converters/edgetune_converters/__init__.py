"""Base checkpoint plus adapter to GGUF, ONNX and safetensors in one streaming pass.

Needs no torch, prints nothing, knows no command line. The public API: describe what to write in an `ExportRequest`,
look at it with `plan`, write it with `export`.

    from edgetune_converters import ExportRequest, Target, export

    target = Target("gguf", "q4_k_m", Path("model.gguf"))
    (receipt,) = export(ExportRequest(Path("base"), (target,), adapter=Path("adapter")))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune_converters.errors import (
        AdapterError,
        ArchitectureError,
        ArtifactError,
        CheckpointError,
        EdgetuneError,
        RecipeError,
        TokenizerError,
    )
    from edgetune_converters.exporting import export
    from edgetune_converters.planning import plan
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.request import ExportRequest, Target

_MODULES = {
    "exporting": ("export",),
    "planning": ("plan",),
    "request": ("ExportRequest", "Target"),
    "provenance.receipts": ("Receipt",),
    "errors": (
        "AdapterError", "ArchitectureError", "ArtifactError", "CheckpointError", "EdgetuneError", "RecipeError",
        "TokenizerError",
    ),
}  # fmt: skip

__all__ = [
    "AdapterError",
    "ArchitectureError",
    "ArtifactError",
    "CheckpointError",
    "EdgetuneError",
    "ExportRequest",
    "Receipt",
    "RecipeError",
    "Target",
    "TokenizerError",
    "export",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: importing this package alone loads nothing."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
