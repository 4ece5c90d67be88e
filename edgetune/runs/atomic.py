"""JSON for people and programs: indented, but a list of plain values stands on one line."""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any, indent: str = "") -> str:
    """As `json.dumps(value, indent=2, ensure_ascii=False)` would have it, save that a list without a mapping in it
    stays on its line. Keys must be strings.
    """
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = (f"{deeper}{json.dumps(key, ensure_ascii=False)}: {dumps(each, deeper)}" for key, each in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and _has_mapping(value):
        return "[\n" + ",\n".join(deeper + dumps(each, deeper) for each in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _has_mapping(values: list[Any] | tuple[Any, ...]) -> bool:
    return any(isinstance(each, dict) or (isinstance(each, (list, tuple)) and _has_mapping(each)) for each in values)
