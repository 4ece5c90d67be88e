"""GGUF LoRA adapters on a model that has been loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.errors import RuntimeProblem
from edgetune.runtime.artifacts import is_adapter
from edgetune.runtime.llama_library import collecting_errors, library
from edgetune.runtime.slots import LoadedAdapter


def load_adapter(model: Any, path: Path) -> LoadedAdapter:
    """Load the adapter in a file.

    Raises:
        RuntimeProblem: The file does not exist, is no adapter, or is one of another model.
    """
    if not path.is_file():
        raise RuntimeProblem(f"there is no file {path}", "Export an adapter with `--format gguf-lora`")
    if not is_adapter(path):
        raise RuntimeProblem(f"{path} is not a GGUF adapter", "Export one with `--format gguf-lora`")
    lib = library()
    with collecting_errors() as errors:
        pointer = lib.llama_adapter_lora_init(model, str(path).encode())
    if not pointer:
        raise RuntimeProblem(f"llama.cpp cannot load {path}: {errors.cause}", "Give an adapter of this model")
    if lib.llama_adapter_get_alora_n_invocation_tokens(pointer):
        lib.llama_adapter_lora_free(pointer)
        raise RuntimeProblem(f"{path} is an activated LoRA, which edgetune does not run", "Give a LoRA adapter")
    return LoadedAdapter(path, pointer)
