"""A graph in ONNX Runtime: its options, and its failures in one sentence."""

from __future__ import annotations

import re
from typing import Any

from edgetune.errors import EnvironmentProblem
from edgetune.runtime.interface import RuntimeProblem
from edgetune.runtime.onnx.model_file import GraphFile
from edgetune.runtime.onnx.operators import missing_operator

_SILENT = 4  # log fatal errors only; the others arrive as exceptions

# Measured on a 1.24 B model at int4, two threads (docs/benchmarks.md): what is not here stayed as ONNX Runtime has it.
# On a busy machine, a thread that spins while it waits for its peer takes the core that this peer needs. On an idle one
# a thread that sleeps has to be woken for each of 113 products a token, which takes some 50 microseconds.
_SLEEPING = {"session.intra_op.allow_spinning": "0"}
_SPINNING = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "200"}
_BOUNDED = (1, 26)  # the first release that knows a duration: those before spin for tens of milliseconds


def library() -> Any:
    """The module onnxruntime."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"ONNX Runtime cannot be loaded: {error}", "Reinstall it: pip install --force-reinstall onnxruntime"
        ) from error
    return onnxruntime


def session_options(threads: int, *, spinning: bool = False) -> Any:
    """SessionOptions for one decoder on the CPU; `spinning`: threads wait for each other awake, if only for a while."""
    chosen = library().SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = _SILENT
    for key, value in (_SPINNING if spinning and _spins_for_a_while() else _SLEEPING).items():
        chosen.add_session_config_entry(key, value)
    return chosen


def _spins_for_a_while() -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", library().__version__)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _BOUNDED


def open_session(model: GraphFile, threads: int, *, spinning: bool = False) -> Any:
    """An InferenceSession; it maps the external data itself. Errors: RuntimeProblem with ONNX Runtime's words."""
    onnxruntime = library()
    try:
        return onnxruntime.InferenceSession(
            str(model.path),
            session_options(threads, spinning=spinning),
            providers=["CPUExecutionProvider"],
            enable_fallback=0,
        )
    except Exception as error:  # noqa: BLE001 - its exceptions have no common base but this
        missing = missing_operator(model)
        if missing is not None:
            raise missing from None
        raise RuntimeProblem(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {model.path}: {error_text(error)}",
            "Look at it with `edgetune inspect`.",
        ) from None


def error_text(error: Exception) -> str:
    """ONNX Runtime's message without its code and the place in its source: `[ONNXRuntimeError] : 1 : FAIL : ...`."""
    text = str(error)
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return " ".join(text.split())[:400]
