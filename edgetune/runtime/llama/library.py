"""llama.cpp's library through llama-cpp-python's ctypes functions: loaded once, silent, its errors kept when asked for.

A log callback written in Python is a trap: Python handles a pending Ctrl-C at the start of any Python function, so the
KeyboardInterrupt is raised inside the callback, where ctypes prints and drops it. So llama.cpp normally logs into a C
function that does nothing; only `collecting_errors` listens, and holds signals back meanwhile.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from edgetune.errors import EnvironmentProblem

_ERROR = 4  # enum ggml_log_level, ggml.h


@cache
def library() -> Any:
    """The module llama_cpp.llama_cpp, with the backend initialised and nothing logged."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"llama.cpp cannot be loaded: {error}",
            "Reinstall it: pip install --force-reinstall llama-cpp-python==0.3.36",
        ) from error
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _silence(llama_cpp: Any) -> Any:
    """libc's getpid as a log callback: it takes no notice of its arguments and changes nothing."""
    return ctypes.cast(ctypes.CDLL(None).getpid, llama_cpp.llama_log_callback)


class Errors(list[str]):
    """Error lines of llama.cpp."""

    @property
    def cause(self) -> str:
        """The first line, without the name of llama.cpp's function: it says why, the later ones what followed."""
        line = self[0] if self else "llama.cpp gave no reason"
        function, separator, rest = line.partition(": ")
        return rest if separator and " " not in function else line


@contextmanager
def collecting_errors() -> Iterator[Errors]:
    """Listen to llama.cpp during a call; Ctrl-C takes effect after it."""
    llama_cpp, errors = library(), Errors()

    def keep(level: int, text: bytes | None, _: Any) -> None:
        line = (text or b"").decode("utf-8", "replace").strip()
        if level == _ERROR and line:
            errors.append(line)

    callback = llama_cpp.llama_log_callback(keep)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    llama_cpp.llama_log_set(callback, None)
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(_silence(llama_cpp), None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
