"""Sessions of ONNX Runtime: their options, and their errors in one sentence."""

from __future__ import annotations

import re
from typing import Any

from edgetune.errors import EnvironmentProblem, RuntimeProblem
from edgetune.runtime.onnx.model_file import GraphFile
from edgetune.runtime.onnx.operators import missing_operator

_SILENT = 4  # log fatal errors only; the others arrive as exceptions

# Measured on a 1.24 B model at int4, two threads (docs/benchmarks.md); all other options are the defaults.
# On a busy machine, a thread that spins while it waits for its peer takes the core that the peer needs. On an idle
# machine, a sleeping thread must be woken for each of 113 products a token, which takes about 50 microseconds.
_SLEEPING = {"session.intra_op.allow_spinning": "0"}
_SPINNING = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "200"}
_BOUNDED_SPINNING = (1, 26)  # first release with a spin duration; earlier ones spin for tens of milliseconds


def library() -> Any:
    """Return the module onnxruntime."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"ONNX Runtime cannot be loaded: {error}", "Reinstall it: pip install --force-reinstall onnxruntime"
        ) from error
    return onnxruntime


def session_options(threads: int, *, spinning: bool = False) -> Any:
    """Return SessionOptions for a decoder on the CPU; with `spinning`, idle threads spin for at most 0.2 ms."""
    chosen = library().SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = _SILENT
    for key, value in (_SPINNING if spinning and _can_bound_spinning() else _SLEEPING).items():
        chosen.add_session_config_entry(key, value)
    return chosen


def _can_bound_spinning() -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", library().__version__)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _BOUNDED_SPINNING


def open_session(model: GraphFile, threads: int, *, spinning: bool = False) -> Any:
    """Return an InferenceSession, which maps the external data. Raises RuntimeProblem with ONNX Runtime's message."""
    onnxruntime = library()
    try:
        return onnxruntime.InferenceSession(
            str(model.path),
            session_options(threads, spinning=spinning),
            providers=["CPUExecutionProvider"],
            enable_fallback=0,
        )
    except Exception as error:  # noqa: BLE001 - its exceptions have no other common base
        missing = missing_operator(model)
        if missing is not None:
            raise missing from None
        raise RuntimeProblem(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {model.path}: {error_text(error)}",
            "Look at it with `edgetune inspect`",
        ) from None


def error_text(error: Exception) -> str:
    """Return ONNX Runtime's message without its prefix `[ONNXRuntimeError] : 1 : FAIL : `."""
    text = str(error)
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return " ".join(text.split())[:400]
