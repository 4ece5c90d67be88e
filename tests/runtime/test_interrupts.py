"""A signal raises the flag while C code runs, and the flag can be taken down."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from edgetune.runtime.interrupts import InterruptFlag

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


@pytest.fixture(autouse=True)
def deaf() -> Iterator[None]:
    """Python's own handler does nothing."""
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, previous)


def test_a_signal_raises_the_flag_at_once() -> None:
    flag = InterruptFlag()
    raised = flag.callback(CALLBACK)
    with flag.watching():
        assert not raised(flag.data)
        ctypes.CDLL(None).kill(os.getpid(), signal.SIGUSR1)  # seen as soon as the C call that sent it returns
        assert raised(flag.data)
    flag.clear()
    assert not raised(flag.data)
    with flag.watching():
        assert not raised(flag.data)
    flag.close()


def test_the_previous_wakeup_file_is_restored() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    flag = InterruptFlag()
    with flag.watching():
        pass
    assert signal.set_wakeup_fd(before) == writer
    flag.close()
    os.close(reader)
    os.close(writer)


def test_another_thread_may_watch_without_effect() -> None:
    flag = InterruptFlag()
    done = []

    def work() -> None:
        with flag.watching():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    flag.close()
