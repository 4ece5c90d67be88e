"""Typed values of GGUF metadata and their bytes. GGUF has eight integer types, so each value states its type."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

from edgetune_converters.errors import ArtifactError

Scalar = str | int | float | bool
Plain = Scalar | list[str] | list[int] | list[float] | list[bool]


class ValueKind(IntEnum):
    """Value types, numbered as in the file."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


# struct codes of the types of fixed width, little-endian
STRUCT_CODES = {
    ValueKind.U8: "B",
    ValueKind.I8: "b",
    ValueKind.U16: "H",
    ValueKind.I16: "h",
    ValueKind.U32: "I",
    ValueKind.I32: "i",
    ValueKind.F32: "f",
    ValueKind.BOOL: "?",
    ValueKind.U64: "Q",
    ValueKind.I64: "q",
    ValueKind.F64: "d",
}


class Value(NamedTuple):
    """A scalar of `kind`, or an array of values of `element` kind when `kind` is ARRAY."""

    kind: ValueKind
    data: Plain
    element: ValueKind | None = None


def u32(number: int) -> Value:
    """An unsigned 32-bit integer."""
    return Value(ValueKind.U32, number)


def f32(number: float) -> Value:
    """A 32-bit float."""
    return Value(ValueKind.F32, number)


def boolean(flag: bool) -> Value:
    """A truth value."""
    return Value(ValueKind.BOOL, flag)


def string(text: str) -> Value:
    """UTF-8 text."""
    return Value(ValueKind.STRING, text)


def strings(texts: Sequence[str]) -> Value:
    """An array of UTF-8 texts."""
    return Value(ValueKind.ARRAY, list(texts), ValueKind.STRING)


def i32s(numbers: Sequence[int]) -> Value:
    """An array of signed 32-bit integers."""
    return Value(ValueKind.ARRAY, list(numbers), ValueKind.I32)


def f32s(numbers: Sequence[float]) -> Value:
    """An array of 32-bit floats."""
    return Value(ValueKind.ARRAY, list(numbers), ValueKind.F32)


def booleans(flags: Sequence[bool]) -> Value:
    """An array of truth values."""
    return Value(ValueKind.ARRAY, list(flags), ValueKind.BOOL)


def value_of(value: Scalar) -> Value:
    """Return the value of the widest type for a Python scalar: string, bool, 64-bit integer or 64-bit float."""
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, int):
        return Value(ValueKind.I64, value)
    if isinstance(value, float):
        return Value(ValueKind.F64, value)
    return string(value)


def encode_string(text: str) -> bytes:
    """Return the length as u64, followed by the text as UTF-8."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(f"the text {text!r} cannot be written as UTF-8") from error
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Value) -> bytes:
    """Return the bytes of a value: type, then payload."""
    try:
        return struct.pack("<I", value.kind) + _payload(value)
    except (struct.error, OverflowError) as error:
        raise ArtifactError(f"the value {value.data!r} does not fit into {value.kind.name.lower()}") from error


def _payload(value: Value) -> bytes:
    if value.kind is ValueKind.STRING:
        return encode_string(str(value.data))
    if value.kind is not ValueKind.ARRAY:
        return struct.pack("<" + STRUCT_CODES[value.kind], value.data)
    assert isinstance(value.data, list)
    assert value.element is not None
    head = struct.pack("<IQ", value.element, len(value.data))
    if value.element is ValueKind.STRING:
        return head + _strings(value.data)
    return head + struct.pack(f"<{len(value.data)}{STRUCT_CODES[value.element]}", *value.data)


def _strings(texts: Sequence[object]) -> bytes:
    """Return `encode_string` of each text, faster: a vocabulary has hundreds of thousands."""
    try:
        raw = [str(text).encode() for text in texts]
    except UnicodeEncodeError:
        return b"".join(encode_string(str(text)) for text in texts)
    lengths = map(struct.Struct("<Q").pack, map(len, raw))
    return b"".join(chain.from_iterable(zip(lengths, raw, strict=True)))


def as_read(value: Value) -> Plain:
    """Return what a reader returns for `value`: 32-bit floats are rounded."""
    if ValueKind.F32 not in (value.kind, value.element):
        return value.data
    if isinstance(value.data, list):
        code = f"<{len(value.data)}f"
        return list(struct.unpack(code, struct.pack(code, *value.data)))
    rounded: float = struct.unpack("<f", struct.pack("<f", value.data))[0]
    return rounded
