"""Something that happens after a step of a training: a signal, or an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgetune.training.callbacks import MetricsCallback


def at_step(step: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Call a function after a step."""
    stepped = MetricsCallback._stepped

    def acting(self: MetricsCallback, at: int, last: int, logs: Any) -> None:
        stepped(self, at, last, logs)
        if at == step:
            act()

    patch.setattr(MetricsCallback, "_stepped", acting)


def stop_after(step: int, patch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise an error after a step."""

    def stop() -> None:
        raise error

    at_step(step, stop, patch)
