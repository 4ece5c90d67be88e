"""A process in a pseudo-terminal, as a person would use it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

SECONDS = 60


class Terminal:
    """Types into a process, and reads what it shows, with escape sequences."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        names = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **names}, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self._seen = b""

    def press(self, keys: str) -> None:
        """Press keys; "\x03" is Ctrl-C."""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> str:
        """Return what was shown since the last call, up to a text."""
        end = time.monotonic() + SECONDS
        while text.encode() not in self._seen:
            assert self._read(end - time.monotonic()), f"{text!r} was not shown, only {self._seen.decode()!r}"
        before, _, self._seen = self._seen.partition(text.encode())
        return (before + text.encode()).decode()

    def finish(self) -> tuple[int, str]:
        """Return the exit code, and what was shown since the last call."""
        end = time.monotonic() + SECONDS
        while self._read(end - time.monotonic()):
            pass
        assert time.monotonic() < end, f"it does not end, after {self._seen.decode()!r}"
        return self.process.wait(SECONDS), self._seen.decode()

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(0, seconds))[0]:
            return False
        try:
            found = os.read(self._ours, 1 << 16)
        except OSError:  # the process has ended
            return False
        self._seen += found
        return bool(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
