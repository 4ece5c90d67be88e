"""What this CPU can do."""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import _backend
from .results import AmxProbe, Cpu

__all__ = ["cpu", "probe_amx"]


def cpu() -> Cpu:
    """Return the instruction set in use, the reason for the choice, and the features of this CPU."""
    isa, reason, features = _backend.kernels.cpu()
    return Cpu(isa, reason, tuple(features.split()))


def probe_amx() -> AmxProbe:
    """Return whether AMX works on this machine.

    Some virtual machines advertise AMX and fault on its first instruction. So it is tried once, in a child process.
    """
    return _probe_once(_backend.kernels.probe_amx)


@functools.cache
def _probe_once(probe: Callable[[bool], tuple[bool, bool, str]]) -> AmxProbe:
    return AmxProbe(*probe(False))
