"""What is known of the CPU without compiled code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu", "probe_amx"]


def cpu() -> tuple[str, str, str]:
    """Return (instruction set, reason, features separated by spaces)."""
    chosen = os.environ.get("EDGETUNE_PURE") == "1"
    return "numpy", f"{'EDGETUNE_PURE=1 selects ' if chosen else ''}the NumPy reference backend", ""


def probe_amx(force: bool, /) -> tuple[bool, bool, str]:
    """Return (advertised, usable, reason). AMX cannot be tried without compiled code, so it counts as unusable."""
    try:
        advertised = "amx_int8" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False, False, "not applicable: AMX exists on x86-64 and is probed on Linux"
    if advertised:
        return (
            True,
            False,
            "the CPU advertises AMX; the NumPy reference backend cannot try it, so it counts as unusable",
        )
    return False, False, "this CPU does not advertise AMX"
