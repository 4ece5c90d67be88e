"""Open an exported file with the library that runs its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgetune.errors import RuntimeProblem
from edgetune.runtime.artifacts import artifact_format, is_adapter, is_model, select_models
from edgetune.runtime.interface import Runtime
from edgetune.runtime.machine_fit import MachineFit


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    clip: bool = False,
    fit: MachineFit | None = None,
) -> Runtime:
    """Open an exported GGUF file or ONNX folder.

    Args:
        path: A .gguf file, a folder with model.onnx, or the .onnx file in it.
        threads: Threads that evaluate the model; None takes the physical cores (1 for a tiny model).
        context: Tokens that a prompt and its answer may have together; None takes the model's own, at most 4096.
        fit: Settings under which it runs; `threads` goes before those of it. See `machine_fit.find_fit`.
        clip: Whether a context that is too long for the rotary tables of an ONNX graph is cut instead of refused.

    Raises:
        RuntimeProblem: The file does not exist, is not a model, or its library cannot run it.
        ArtifactError: The file is damaged.
    """
    path = Path(path)
    require_file(path)
    found = artifact_format(path)
    if found is None:
        raise _not_a_model(path)
    return RUNTIMES[found](path, threads, context, clip, fit)


def load_text_model(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    clip: bool = False,
    fit: MachineFit | None = None,
) -> Runtime:
    """Open an exported file whose texts are wanted, as `load` does. Raises RuntimeProblem for a reward model, too."""
    runtime = load(path, threads=threads, context=context, clip=clip, fit=fit)
    if runtime.is_reward_model:
        runtime.close()
        raise reward_model_problem(Path(path))
    return runtime


def reward_model_problem(path: Path) -> RuntimeProblem:
    """Return the error for a reward model that is asked for texts."""
    return RuntimeProblem(
        f"{path} is a reward model: it gives a score for a text and was not trained to write any",
        f"`edgetune validate RUN {path.name}` compares its scores with the trained ones; in Python, "
        f'edgetune.load("{path.name}").reward_scores([ids]) gives them',
    )


def require_file(path: Path) -> None:
    """Raise RuntimeProblem if there is nothing at `path`."""
    if not path.exists():
        raise RuntimeProblem(f"there is no file {path}", "Export one with `edgetune merge-export RUN`")


def _open_gguf(path: Path, threads: int | None, context: int | None, clip: bool, fit: MachineFit | None) -> Runtime:
    from edgetune.runtime.llama.runtime import LlamaRuntime

    try:
        return LlamaRuntime(path, threads=threads, context=context, fit=fit)
    except RuntimeProblem:
        if is_adapter(path):
            raise RuntimeProblem(
                f"{path} is an adapter, which runs only with its base: llama-cli -m BASE.gguf --lora {path.name}",
                "Export the merged model with `edgetune merge-export --format gguf`",
            ) from None
        raise


def _open_onnx(path: Path, threads: int | None, context: int | None, clip: bool, fit: MachineFit | None) -> Runtime:
    from edgetune.runtime.onnx.runtime import OnnxRuntime

    threads = threads or (fit.threads if fit else None)
    return OnnxRuntime(path, threads=threads, context=context, clip=clip)


RUNTIMES: dict[str, Callable[[Path, int | None, int | None, bool, MachineFit | None], Runtime]] = {
    "gguf": _open_gguf, "onnx": _open_onnx
}  # fmt: skip
"""Format -> function that opens (path, threads, context, clip, fit). Libraries are imported when they are needed."""


def _not_a_model(directory: Path) -> RuntimeProblem:
    if any(directory.glob("*.safetensors")):
        return RuntimeProblem(
            f"{directory} is a model directory for transformers, which edgetune does not run",
            f"Export it with `edgetune merge-export --base {directory} -q q8_0`",
        )
    from edgetune.runs.directory import RunDirectory  # takes as long as opening a small file

    candidates = sorted([*RunDirectory(directory).artifacts.glob("*"), *directory.glob("*")])
    models = [each for each in select_models(candidates)[0] if is_model(each)]
    hint = f"Give a file, for instance {models[0]}" if models else "Export a file with `edgetune merge-export`"
    return RuntimeProblem(f"{directory} is a directory, not an exported file", hint)
