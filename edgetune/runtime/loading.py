"""Which library runs which file."""

from __future__ import annotations

from pathlib import Path

from edgetune.runs.directory import RunDirectory
from edgetune.runtime.interface import Runtime, RuntimeProblem
from edgetune.runtime.onnx.folder import is_onnx


def load(path: Path, *, threads: int | None = None, context: int | None = None, clip: bool = False) -> Runtime:
    """Open an exported file or folder. `threads`: None is one per physical core.

    `context` in tokens: None lets the file decide. One that a graph has no tables for is an error; with `clip` it is
    cut to what there is.

    Raises RuntimeProblem or ArtifactError, in one sentence, for anything that cannot be run.
    """
    if not path.exists():
        raise RuntimeProblem(f"there is no file {path}", "Export one with `edgetune merge-export RUN`.")
    if is_onnx(path):
        return _open_onnx(path, threads, context, clip)
    if path.is_dir():
        raise _is_directory(path)
    return _open_gguf(path, threads, context)  # a GGUF file by any other name is recognised by its magic


def _open_gguf(path: Path, threads: int | None, context: int | None) -> Runtime:
    from edgetune.runtime.llama.runtime import LlamaRuntime

    try:
        return LlamaRuntime(path, threads=threads, context=context)
    except RuntimeProblem:
        from edgetune.runtime import artifacts

        if artifacts.is_adapter(path):
            raise RuntimeProblem(
                f"{path} holds an adapter alone, which runs with its base: llama-cli -m BASE.gguf --lora {path.name}",
                "Merged into its base it is exported by `edgetune merge-export --format gguf`.",
            ) from None
        raise


def _open_onnx(path: Path, threads: int | None, context: int | None, clip: bool) -> Runtime:
    from edgetune.runtime.onnx.runtime import OnnxRuntime

    return OnnxRuntime(path, threads=threads, context=context, clip=clip)


def _is_directory(path: Path) -> RuntimeProblem:
    from edgetune.runtime.artifacts import models_among

    if any(path.glob("*.safetensors")):
        return RuntimeProblem(
            f"{path} is a model directory for transformers, which is not run here",
            f"Export it with `edgetune merge-export --base {path} -q q8_0`.",
        )
    lying = sorted([*RunDirectory(path).artifacts.glob("*"), *path.glob("*")])
    models = [each for each in models_among(lying)[0] if each.suffix == ".gguf" or is_onnx(each)]
    hint = f"Give a file, for instance {models[0]}." if models else "Export a file with `edgetune merge-export`."
    return RuntimeProblem(f"{path} is a directory, not an exported file", hint)
