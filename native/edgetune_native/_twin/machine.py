"""What can be said of the machine without compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cpu() -> tuple[str, str, str]:
    """(isa, reason, features separated by spaces)."""
    reason = "EDGETUNE_PURE=1 asks for the numpy twin" if os.environ.get("EDGETUNE_PURE") == "1" else "the numpy twin"
    return "numpy", reason, ""


def probe_amx(force: bool, /) -> tuple[bool, bool, str]:
    """(advertised, usable, reason); without compiled code nothing can be tried, so an advertisement is not trusted."""
    try:
        advertised = "amx_int8" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False, False, "not applicable: AMX exists on x86-64 and is looked for on Linux"
    if advertised:
        return True, False, "the CPU advertises AMX; the numpy twin cannot try it, so it counts as unusable"
    return False, False, "this CPU does not advertise AMX"
