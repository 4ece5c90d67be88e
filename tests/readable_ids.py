"""Readable ids of parametrized cases: `symmetric=False`, `37x301` and `rank=4,alpha=8`, not `False` and `shape0`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import CodeType, FunctionType

LONGEST = 48


def readable_id(value: object, name: str) -> str | None:
    """Return the id of the value of one parameter, or None where pytest's own is readable."""
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{name}={value}"
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
        return _shorten("_".join(_words(value.__code__))) or None
    if isinstance(value, Enum) or hasattr(value, "__name__"):
        return None
    return _shorten(_text(value)) or f"{name}=empty"


def _text(value: object) -> str:
    if hasattr(value, "__name__"):  # a class or a function
        return str(value.__name__)
    if isinstance(value, bytes):
        return f"{len(value)}_bytes_{value[:12].hex()}" if value else ""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, tuple) and value and all(type(item) is int for item in value):
        return "x".join(map(str, value))
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    if isinstance(value, (set, frozenset)):
        return ",".join(sorted(map(_text, value)))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{'x'.join(map(str, value.shape))}]"
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        usual = {field.name: field.default for field in fields(value) if field.default is not MISSING}
        return _text({key: item for key, item in own.items() if key not in usual or _text(item) != _text(usual[key])})
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def _words(code: CodeType) -> list[str]:
    """Return the names and constants in the body of a lambda, which tell it from its neighbors."""
    constants = [str(value) for value in code.co_consts if isinstance(value, (str, int)) and value != ""]
    return [*code.co_names, *constants]


def _shorten(text: str) -> str:
    text = " ".join(text.split()).encode("ascii", "backslashreplace").decode()  # xdist sends no lone surrogates
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
