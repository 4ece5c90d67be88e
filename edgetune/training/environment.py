"""The environment of a training: installed versions, the device, and silence of third-party libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from edgetune.errors import EnvironmentProblem

EXTRA = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl")
_RECORDED = ("edgetune", *EXTRA, "tokenizers", "safetensors", "numpy")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64 and, the last one, of AArch64
_NOISY = (
    "galore_torch",
    "apollo_torch",
    "transformers",
    "bitsandbytes",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "torch",
    "huggingface_hub",
)

# Set before the libraries are imported. TRL and huggingface_hub send telemetry by default.
_SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "BITSANDBYTES_NOWELCOME": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TRL_EXPERIMENTAL_SILENCE": "1",  # docs/objectives.md names the objectives whose trainers are experimental
    # Waiting threads of torch's OpenMP spin for milliseconds by default. On a machine with other work, a step of a
    # small model took 14.5 s with that and 0.7 s with this.
    "GOMP_SPINCOUNT": "1000",
}


def require_train_extra() -> None:
    """Raise EnvironmentProblem if a package of the `train` extra is missing; import none of them."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"training needs {', '.join(missing)}", "Run `pip install 'edgetune[train]'`")


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress warnings and log lines of the training libraries; edgetune reports what matters itself."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    os.environ.update({name: value for name, value in _SETTINGS.items() if before[name] is None})
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(" + "|".join(_NOISY) + r")(\.|$)")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            # attributed to our own line, whatever library it comes from
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def installed_versions() -> dict[str, str]:
    """Return the versions of all packages that affect the result."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device() -> dict[str, Any]:
    """Return the device of the training for the manifest: {"type": "cuda" | "cpu", "name": ...}. Imports torch."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return {"type": "cuda", "name": torch.cuda.get_device_name(0), "memory_bytes": memory}
    return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}


def emulates_bfloat16() -> bool:
    """Whether training runs on a CPU without bfloat16 instructions, where such products are some ten times slower."""
    import torch

    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return not torch.cuda.is_available() and bool(flags) and not flags & _BFLOAT16_FLAGS


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def _cpuinfo(field: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - not a file of ours
            values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
            return next(values, "")
    except OSError:
        return ""
