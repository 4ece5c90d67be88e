"""Which library runs which file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgetune.run_directory import RunDirectory
from edgetune.runtime.interface import Runtime, RuntimeProblem

Opener = Callable[[Path, int | None, int | None], Runtime]


def load(path: Path, *, threads: int | None = None, context: int | None = None) -> Runtime:
    """Open an exported file. `threads`: None is one per physical core; `context` in tokens: None lets the file decide.

    Raises RuntimeProblem or ArtifactError, in one sentence, for anything that cannot be run.
    """
    if path.is_dir():
        raise _is_directory(path)
    if not path.exists():
        raise RuntimeProblem(f"there is no file {path}", "Export one with `edgetune merge-export RUN`.")
    opener = OPENERS.get(path.suffix.lower(), _open_gguf)  # a GGUF file by any other name is recognised by its magic
    return opener(path, threads, context)


def _open_gguf(path: Path, threads: int | None, context: int | None) -> Runtime:
    from edgetune.runtime.llama_cpp import LlamaRuntime

    return LlamaRuntime(path, threads=threads, context=context)


OPENERS: dict[str, Opener] = {".gguf": _open_gguf}


def _is_directory(path: Path) -> RuntimeProblem:
    artifacts = sorted(RunDirectory(path).artifacts.glob("*.gguf"))
    hint = f"Give a file, for instance {artifacts[0]}." if artifacts else "Export a file with `edgetune merge-export`."
    return RuntimeProblem(f"{path} is a directory, not an exported file", hint)
