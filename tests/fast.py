"""Which tests are fast: pure Python and the kernels. No torch, no process of its own, no browser, no large matrix."""

from __future__ import annotations

from pathlib import Path

TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets"}


def is_fast(path: Path) -> bool:
    return True
