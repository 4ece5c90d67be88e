"""Ctrl-C while C code computes: a flag in memory that the signal itself sets, without Python having to run.

Python notes a signal and handles it when the C function returns, which can be half a minute for a long prompt.
`signal.set_wakeup_fd` makes the C-level handler write the signal's number to a file descriptor at once; ours is a small
file in memory that is also mapped. llama.cpp asks an abort callback `bool f(void *data)` before each operation; libc's
strlen of that memory is one: 0 while the first byte is 0, else not. No thread, no lock, no Python in C's way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PAGE = mmap.PAGESIZE


class InterruptFlag:
    """`callback` and `data` for llama.cpp; `watching()` around a call that should stop at a signal."""

    def __init__(self) -> None:
        """Where the system lacks memory files (it is not Linux), the flag never rises and Ctrl-C waits for the call."""
        self._file = os.memfd_create("edgetune-interrupt") if hasattr(os, "memfd_create") else None
        if self._file is None:
            self._memory = mmap.mmap(-1, _PAGE)
        else:
            os.ftruncate(self._file, _PAGE)
            os.set_blocking(self._file, False)  # set_wakeup_fd insists
            self._memory = mmap.mmap(self._file, _PAGE)
        self._start = ctypes.c_char.from_buffer(self._memory)
        self.data = ctypes.addressof(self._start)

    @staticmethod
    def callback(kind: type[Any]) -> Any:
        """strlen as a C function pointer of the ctypes type `kind`."""
        return ctypes.cast(ctypes.CDLL(None).strlen, kind)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Signals that arrive meanwhile raise the flag (in the main thread only; elsewhere nothing is watched)."""
        if self._file is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._memory[0:_PAGE] = bytes(_PAGE)
        os.lseek(self._file, 0, os.SEEK_SET)
        previous = signal.set_wakeup_fd(self._file, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)

    def lower(self) -> None:
        """Take the flag down again; a call that is not watched must not stop at an earlier signal."""
        self._memory[0] = 0

    def close(self) -> None:
        """Give file and memory back."""
        del self._start
        self._memory.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def terminating(options: Any) -> Iterator[None]:
    """A signal that arrives meanwhile sets `options.terminate`, at which ONNX Runtime ends its call.

    Its flag is a C++ bool without a known address, so a thread waits for the signal's number on a pipe; ONNX Runtime
    does not hold Python's lock while it computes. In the main thread only, where Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    waiting = threading.Thread(target=_terminate_at_signal, args=(reader, options), daemon=True)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    waiting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writer, _OVER)
        waiting.join()
        os.close(reader)
        os.close(writer)


_OVER = b"\0"  # no signal has this number


def _terminate_at_signal(reader: int, options: Any) -> None:
    if os.read(reader, 1) != _OVER:
        options.terminate = True
