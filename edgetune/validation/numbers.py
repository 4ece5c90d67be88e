"""Numbers for people: significant digits, units, and a dash for what was not measured.

The page uses typographic forms (1.2×10⁻⁵, 97.3 %), the terminal plain ones (1e-05, 97.3%).
"""

from __future__ import annotations

import math
from typing import Any

from edgetune.validation.results import Mean

NOTHING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any) -> float | None:
    """Return a finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def short(value: Any, digits: int = 3, *, plain: bool = False) -> str:
    """Format with so many significant digits, in the shorter of the two forms: 0.0312, 1.2×10⁻⁵, 13.5, 185."""
    exact = number(value)
    if exact is None:
        return NOTHING
    if exact != 0 and (abs(exact) < 1e-4 or abs(exact) >= 1e6):
        if plain:
            return f"{exact:.0e}"
        mantissa, _, exponent = f"{exact:.{max(digits - 2, 0)}e}".partition("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    if abs(exact) >= 10 ** (digits - 1):
        return f"{exact:.0f}" if plain else f"{exact:,.0f}"
    return f"{exact:#.{digits}g}".rstrip(".") if exact else "0"


def with_error(mean: Mean, *, plain: bool = False) -> str:
    """Format `value ± error`."""
    if number(mean.value) is None or number(mean.error) is None:
        return short(mean.value, plain=plain)
    space = " " if plain else "\u00a0"
    return f"{short(mean.value, plain=plain)}{space}±{space}{short(mean.error, 1, plain=plain)}"


def share(value: Any, places: int = 1, *, plain: bool = False) -> str:
    """Format in per cent: 97.3 %. On the page only 1 is 100 %: 0.99999 is > 99.9 %."""
    exact = number(value)
    if exact is None:
        return NOTHING
    text = f"{exact:.{places}%}"
    if plain:
        return text
    if exact < 1 and float(text[:-1]) == 100:
        return f">\u00a099.{'9' * max(places, 1)}\u00a0%"
    return f"{text[:-1]}\u00a0%"


def size(count: Any) -> str:
    """Format bytes: 1.93 MB, 4.37 GB."""
    exact = number(count)
    if exact is None:
        return NOTHING
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if exact >= unit:
            return f"{short(exact / unit)}\u00a0{name}"
    return f"{short(exact / 1e3)}\u00a0kB"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Format a count with its noun: 1 file, 3 files, 1,179 tokens."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
