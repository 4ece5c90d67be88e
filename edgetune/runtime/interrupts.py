"""Ctrl-C during a C function: the signal itself sets a flag in memory, without running Python.

Python handles a signal only when the C function returns, which takes half a minute for a long prompt. With
`signal.set_wakeup_fd`, the C-level handler writes the signal's number to a file descriptor at once: here a small file
in memory that is also mapped. llama.cpp calls an abort callback `bool f(void *data)` before each operation, and libc's
strlen of that memory is such a function: it returns 0 while the first byte is 0. No thread and no lock are needed.
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
    """A flag that a signal sets during `watching()`; `callback` and `data` give it to llama.cpp."""

    def __init__(self) -> None:
        """Create the flag. On a system without memory files (not Linux) it is never set: Ctrl-C waits for the call."""
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
        """Return strlen as a C function pointer of the ctypes type `kind`."""
        return ctypes.cast(ctypes.CDLL(None).strlen, kind)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Set the flag at a signal during the context; in the main thread only, where Python handles signals."""
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

    def clear(self) -> None:
        """Clear the flag, so that a call outside `watching()` does not stop at an earlier signal."""
        self._memory[0] = 0

    def close(self) -> None:
        """Free file and memory. Not idempotent."""
        del self._start
        self._memory.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def terminate_on_signal(options: Any) -> Iterator[None]:
    """Set `options.terminate` of ONNX Runtime's RunOptions at a signal during the context, which ends the call.

    The flag is a C++ bool at an unknown address, so a thread waits for the signal's number on a pipe; ONNX Runtime
    releases the GIL while it computes. In the main thread only, where Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    waiter = threading.Thread(target=_terminate_at_signal, args=(reader, options), daemon=True)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    waiter.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writer, _NO_SIGNAL)
        waiter.join()
        os.close(reader)
        os.close(writer)


_NO_SIGNAL = b"\0"


def _terminate_at_signal(reader: int, options: Any) -> None:
    if os.read(reader, 1) != _NO_SIGNAL:
        options.terminate = True
