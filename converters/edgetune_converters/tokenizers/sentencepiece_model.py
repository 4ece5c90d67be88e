"""Read a SentencePiece model (tokenizer.model) where a directory has no tokenizer.json.

The file is a protobuf message with few fields: pieces with scores and types, and how text is normalized.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_MARK = "\u2581"
# fields of ModelProto, its pieces and its two specifications
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


def as_tokenizer_json(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the equivalent tokenizer.json. Raises TokenizerError."""
    try:
        message = _fields(path.read_bytes())
        pieces = [_piece(raw) for raw in message.get(_PIECES, [])]
        trainer, normalizer = (_fields(message.get(number, [b""])[-1]) for number in (_TRAINER, _NORMALIZER))
    except (OSError, ValueError, struct.error, AttributeError, TypeError) as error:
        raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
    kind = _last(trainer, _MODEL_TYPE, _UNIGRAM)
    if kind not in _BUILDERS or _last(trainer, _SUFFIX, 0) or not pieces:
        hint = "save it as a fast tokenizer: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        raise TokenizerError(f"{path} holds a SentencePiece model of a kind that is not read here", hint)
    return {
        "version": "1.0",
        "added_tokens": _added(pieces),
        "post_processor": _post_processor(pieces, config),
        **_BUILDERS[kind](pieces, normalizer),
    }


def _piece(raw: Any) -> _Piece:
    fields = _fields(raw)
    return _Piece(
        _last(fields, _TEXT, b"").decode(),
        struct.unpack("<f", _last(fields, _SCORE, bytes(4)))[0],
        _last(fields, _TYPE, _NORMAL),
    )


def _bpe(pieces: list[_Piece], normalizer: Mapping[int, list[Any]]) -> dict[str, Any]:
    if _last(normalizer, _CHARSMAP, b""):
        raise TokenizerError(
            "this SentencePiece BPE normalizes text, which llama.cpp does not do for BPE",
            "Models made for language generation use the identity normalizer",
        )
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _MARK}]
    if _last(normalizer, _DUMMY_PREFIX, 1):
        steps.insert(0, {"type": "Prepend", "prepend": _MARK})
    unknown = next((piece.text for piece in pieces if piece.type == _UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "model": {
            "type": "BPE", "vocab": vocab, "merges": _merges(pieces), "unk_token": unknown, "fuse_unk": True,
            "byte_fallback": any(piece.type == _BYTE for piece in pieces),
        },
    }  # fmt: skip


def merges_of_scores(rows: Iterable[tuple[str, float, int]]) -> list[list[str]]:
    """Return every way of merging two tokens into a third, the best third first.

    `rows` are text, score and type of each token; the types are numbered alike in SentencePiece and GGUF.
    """
    return _merges([_Piece(*row) for row in rows])


def _merges(pieces: list[_Piece]) -> list[list[str]]:
    merged = [piece for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED, _UNUSED)]
    known = {piece.text for piece in merged}
    ordered = sorted((piece for piece in merged if piece.type == _NORMAL), key=lambda piece: -piece.score)
    return [
        [piece.text[:cut], piece.text[cut:]]
        for piece in ordered
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in known and piece.text[cut:] in known
    ]


def _unigram(pieces: list[_Piece], normalizer: Mapping[int, list[Any]]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    charsmap = _last(normalizer, _CHARSMAP, b"")
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if _last(normalizer, _EXTRA_SPACES, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if _last(normalizer, _DUMMY_PREFIX, 1) else "never"
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": scheme, "split": True},
        "model": {
            "type": "Unigram", "vocab": [[piece.text, piece.score] for piece in pieces],
            "unk_id": next((number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN), None),
            "byte_fallback": any(piece.type == _BYTE for piece in pieces),
        },
    }  # fmt: skip


_BUILDERS = {_BPE: _bpe, _UNIGRAM: _unigram}


def _added(pieces: list[_Piece]) -> list[dict[str, Any]]:
    """Control pieces are special added tokens, user-defined pieces added tokens that are not special."""
    kinds = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    return [
        {
            "id": number, "content": piece.text, "special": kinds[piece.type], "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for number, piece in enumerate(pieces)
        if piece.type in kinds
    ]  # fmt: skip


def _post_processor(pieces: list[_Piece], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """BOS before a text unless the configuration says otherwise, as Llama's tokenizers do."""
    numbers = {piece.text: number for number, piece in enumerate(pieces)}
    names = {"bos": ("<s>", True), "eos": ("</s>", False)}
    ends = {}
    for name, (usual, wanted) in names.items():
        stated = config.get(f"{name}_token", usual)
        text = stated.get("content") if isinstance(stated, dict) else stated
        if config.get(f"add_{name}_token", wanted) is True and isinstance(text, str) and text in numbers:
            ends[name] = text
    if not ends:
        return None
    put = {name: [{"SpecialToken": {"id": text, "type_id": 0}}] for name, text in ends.items()}
    single = [*put.get("bos", []), {"Sequence": {"id": "A", "type_id": 0}}, *put.get("eos", [])]
    tokens = {text: {"id": text, "ids": [numbers[text]], "tokens": [text]} for text in ends.values()}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


# -- protobuf ----------------------------------------------------------------------------------------------------------


def _last(fields: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    return fields.get(number, [default])[-1]


def _fields(raw: bytes) -> dict[int, list[Any]]:
    """A message as values by field number: integers, or bytes. Raises ValueError."""
    found: dict[int, list[Any]] = {}
    for number, value in _walk(memoryview(raw)):
        found.setdefault(number, []).append(value)
    return found


def _walk(raw: memoryview) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        length, at = (_FIXED[wire], at) if wire in _FIXED else _length(raw, at, wire)
        if at + length > len(raw):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, bytes(raw[at : at + length])
        at += length


_FIXED = {1: 8, 5: 4}  # wire types of fixed width


def _length(raw: memoryview, at: int, wire: int) -> tuple[int, int]:
    if wire != 2:
        raise ValueError(f"a field has the wire type {wire}")
    return _varint(raw, at)


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(raw) or shift > 63:
            raise ValueError("it ends in the middle of a number")
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
