"""What this CPU can do."""

from __future__ import annotations

import functools

from edgetune_native import _kernels
from edgetune_native.results import AmxProbe, Cpu


class MachineFace:
    """Instruction sets."""

    _kernels: _kernels.Kernels

    def cpu(self) -> Cpu:
        """Return the instruction set in use, why it was chosen, and what the CPU offers."""
        isa, reason, features = self._kernels.cpu()
        return Cpu(isa, reason, tuple(features.split()))

    def probe_amx(self) -> AmxProbe:
        """Return whether AMX works here: tried once, in a child process, because a fault would kill this one."""
        return self._amx

    @functools.cached_property
    def _amx(self) -> AmxProbe:
        return AmxProbe(*self._kernels.probe_amx(False))
