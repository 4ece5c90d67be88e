"""llama.cpp through llama-cpp-python's ctypes functions: loaded once, silent, with its error messages on request.

A log callback in Python would lose Ctrl-C: Python handles a pending signal at the start of any Python function, so
KeyboardInterrupt is raised inside the callback, where ctypes prints and drops it. Therefore llama.cpp logs into a C
function that does nothing. Only `collecting_errors` installs a Python callback, with SIGINT blocked meanwhile.
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
    """Return the module llama_cpp.llama_cpp, with its backend initialized and its log off."""
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
    """Return libc's getpid as a log callback: it ignores its arguments and has no effect."""
    return ctypes.cast(ctypes.CDLL(None).getpid, llama_cpp.llama_log_callback)


class Errors(list[str]):
    """Error lines that llama.cpp logged."""

    @property
    def cause(self) -> str:
        """The first line, which has the cause, without the name of llama.cpp's function."""
        line = self[0] if self else "llama.cpp gave no reason"
        function, separator, rest = line.partition(": ")
        return rest if separator and " " not in function else line


@contextmanager
def collecting_errors() -> Iterator[Errors]:
    """Collect llama.cpp's error messages during a call; Ctrl-C takes effect after it."""
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
