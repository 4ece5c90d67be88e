"""Numbers as they are read: three figures, units, and a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any) -> float | None:
    """A finite float, or None for anything else: null in JSON stands for NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def entry(values: Mapping[str, Any], *path: str) -> Any:
    """values[path[0]][path[1]]..., or None where one of them is not there."""
    found: Any = values
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def short(value: Any, figures: int = 3) -> str:
    """0.0312, 1.2×10⁻⁵, 13.5, 185: three figures, in the shorter of the two forms."""
    exact = number(value)
    if exact is None:
        return NOTHING
    if exact != 0 and (abs(exact) < 1e-4 or abs(exact) >= 1e6):
        mantissa, _, exponent = f"{exact:.{max(figures - 2, 0)}e}".partition("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    if abs(exact) >= 10 ** (figures - 1):
        return f"{exact:,.0f}"
    return f"{exact:#.{figures}g}".rstrip(".") if exact else "0"


def with_error(mean: Any) -> str:
    """`value ± error` of {"value", "error"}."""
    value, error = (number(entry(mean, key)) if isinstance(mean, Mapping) else None for key in ("value", "error"))
    return short(value) if value is None or error is None else f"{short(value)}\u00a0±\u00a0{short(error, 1)}"


def share(value: Any, places: int = 1) -> str:
    """97.3 %; 100 % only for the whole. The space before the sign does not break."""
    exact = number(value)
    if exact is None:
        return NOTHING
    text = f"{exact:.{places}%}"
    if exact < 1 and float(text[:-1]) == 100:
        return f">\u00a099.{'9' * max(places, 1)}\u00a0%"
    return f"{text[:-1]}\u00a0%"


def size(count: Any) -> str:
    """1.93 MB, 4.37 GB."""
    exact = number(count)
    if exact is None:
        return NOTHING
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if exact >= unit:
            return f"{short(exact / unit)}\u00a0{name}"
    return f"{short(exact / 1e3)}\u00a0kB"


def plural(count: int, one: str, many: str | None = None) -> str:
    """1 file, 3 files, 1,179 tokens."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
