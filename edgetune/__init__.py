"""edgetune: fine-tune with QLoRA, export to GGUF or ONNX, run on a CPU, and prove that the file is what was trained.

The Python API: `train`, `export`, `validate`, `load` and `load_async`, with the classes that they take and return. Each
name is imported when it is first used, so `import edgetune` loads neither NumPy nor torch. See docs/python.md.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than that of this package
if TYPE_CHECKING:
    from typing import Any

    from edgetune.config import Config, load_config
    from edgetune.errors import EdgetuneError, RuntimeNotice
    from edgetune.exporting.run import export_run as export
    from edgetune.runs.directory import RunDirectory
    from edgetune.runtime import Answer, Runtime, Sampling, load
    from edgetune.runtime.async_runtime import AsyncAnswer, AsyncRuntime, load_async
    from edgetune.runtime.engine import GenerationRequest, Grammar
    from edgetune.training.run import train
    from edgetune.validation.results import ValidationResults
    from edgetune.validation.validate import validate_run as validate
    from edgetune_converters.provenance.receipts import Receipt

_PUBLIC = {
    "train": "edgetune.training.run:train",
    "export": "edgetune.exporting.run:export_run",
    "validate": "edgetune.validation.validate:validate_run",
    "load": "edgetune.runtime:load",
    "load_async": "edgetune.runtime.async_runtime:load_async",
    "load_config": "edgetune.config:load_config",
    "Answer": "edgetune.runtime:Answer",
    "AsyncAnswer": "edgetune.runtime.async_runtime:AsyncAnswer",
    "AsyncRuntime": "edgetune.runtime.async_runtime:AsyncRuntime",
    "Config": "edgetune.config:Config",
    "EdgetuneError": "edgetune.errors:EdgetuneError",
    "GenerationRequest": "edgetune.runtime.engine:GenerationRequest",
    "Grammar": "edgetune.runtime.engine:Grammar",
    "Receipt": "edgetune_converters.provenance.receipts:Receipt",
    "RunDirectory": "edgetune.runs.directory:RunDirectory",
    "Runtime": "edgetune.runtime:Runtime",
    "RuntimeNotice": "edgetune.errors:RuntimeNotice",
    "Sampling": "edgetune.runtime:Sampling",
    "ValidationResults": "edgetune.validation.results:ValidationResults",
}

__all__ = [
    "Answer", "AsyncAnswer", "AsyncRuntime", "Config", "EdgetuneError", "GenerationRequest", "Grammar", "Receipt",
    "RunDirectory", "Runtime", "RuntimeNotice", "Sampling", "ValidationResults", "__version__", "export", "load",
    "load_async", "load_config", "train", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
