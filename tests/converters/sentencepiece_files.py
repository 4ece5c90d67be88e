"""SentencePiece models written by hand: the protobuf message of a tokenizer.model."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache

_MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Piece = tuple[str, float, int]


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def field(number: int, value: int | bytes) -> bytes:
    """One field: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(
    pieces: Iterable[Piece], kind: int, *, prefix: bool = True, charsmap: bytes = b"", extra: bool = False
) -> bytes:
    """A ModelProto of the kind 1 (unigram) or 2 (BPE)."""
    raw, fallback = b"", False
    for text, score, type_ in pieces:
        fallback |= type_ == BYTE
        piece = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        raw += field(1, piece + (field(3, type_) if type_ != NORMAL else b""))
    raw += field(2, field(3, kind) + field(35, int(fallback)))
    normalizer = field(1, b"identity") + field(2, charsmap) + field(3, int(prefix)) + field(4, int(extra))
    return raw + field(3, normalizer)


_WORDS = ("the", "cat", "sat", "there", "at", "hat", "这只", "猫", "ing", "run", "running", "12", "\n\n")


def _specials(with_bytes: bool) -> list[Piece]:
    found: list[Piece] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    return found + ([(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)] if with_bytes else [])


def _texts() -> list[str]:
    """Pieces from short to long, so that each can be merged from two others."""
    wanted = {prefix for word in _WORDS for start in ("", _MARK) for prefix in _prefixes(start + word)}
    letters = set("".join(_WORDS)) | {_MARK}
    return [*sorted(wanted - letters, key=lambda text: (len(text), text)), *sorted(letters)]


def _prefixes(word: str) -> list[str]:
    return [word[:end] for end in range(1, len(word) + 1)]


@cache
def bpe(*, prefix: bool = True) -> bytes:
    """A BPE with byte fallback and a user-defined piece."""
    merged: list[Piece] = [(text, -float(rank), NORMAL) for rank, text in enumerate(_texts())]
    return model([*_specials(True), *merged, ("<tool>", 0, USER_DEFINED)], 2, prefix=prefix)


@cache
def unigram() -> bytes:
    merged: list[Piece] = [(text, -2.0 - 1.0 / len(text), NORMAL) for text in _texts()]
    return model([*_specials(False), *merged], 1, extra=True)
