"""Keys within tools, tool calls and documents that a chat template does not render.

A key stands for all places of its kind: `tools[].function.strict` is the strict of every tool, and the names of
parameters are one kind (`*`). Removing all of them shows whether the template renders any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[str, ...]

_DEPTH = 8
_DATA = ("arguments", "enum", "default", "examples", "const")
"""Keys whose values are data, with keys that mean nothing to a template."""
_NAMES = ("properties", "$defs", "definitions", "patternProperties")
"""Keys whose values are objects with names for keys."""
_LINKS = ("type", "id")
"""Keys of tools and calls that join them to others, and say nothing beyond that."""


def key_paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the kinds of keys in a list of objects, parents first; a kind can occur more than once."""
    if len(path) > _DEPTH:
        return
    if isinstance(value, list):
        for each in value:
            yield from key_paths(each, path)
    elif isinstance(value, Mapping):
        named = bool(path) and path[-1] in _NAMES
        for key, each in value.items():
            below = (*path, "*" if named else key)
            if each is not None:
                yield below
            if key not in _DATA or named:
                yield from key_paths(each, below)


def without_path(value: Any, path: Path) -> Any:
    """Return a value without the keys of a kind."""
    if isinstance(value, list):
        return [without_path(each, path) for each in value]
    if not isinstance(value, Mapping):
        return value
    first, rest = path[0], path[1:]
    changed = {}
    for key, each in value.items():
        if key != first and first != "*":
            changed[key] = each
        elif rest:
            changed[key] = without_path(each, rest)
    return changed


def unrendered_keys(value: Any, is_rendered_without: Callable[[Any], bool]) -> list[str]:
    """Return the kinds of keys of a list of objects without which the text is the same.

    Args:
        value: The list, of which at least a part is rendered.
        is_rendered_without: Whether the text stays the same with another list in its place.
    """
    found: list[Path] = []
    for path in dict.fromkeys(key_paths(value)):
        if path[-1] in _LINKS and len(path) == 1:
            continue
        if any(path[: len(parent)] == parent for parent in found):
            continue
        if is_rendered_without(without_path(value, path)):
            found.append(path)
    return [".".join(path) for path in found]
