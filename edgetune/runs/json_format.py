"""The layout of the JSON documents: indented for people, but a list of plain values stays on one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune_converters.files import atomic


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. The directory is created where it is missing."""
    atomic.write_text(path, dumps(value) + "\n")


def dumps(value: Any, indent: str = "") -> str:
    """Format as `json.dumps(value, indent=2, ensure_ascii=False)` does, but keep a list without a mapping on one line.

    Keys must be strings.
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
