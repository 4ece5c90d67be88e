"""The text and type of every row of the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.tokenizers.files import TokenizerFiles

MARK = "\u2581"
"""SentencePiece's visible space."""


class TokenType(IntEnum):
    """Token types, numbered as in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenTable:
    """Text and type of each row; rows without a token are padding, of type UNUSED."""

    tokens: list[str]
    types: list[TokenType]
    scores: dict[int, float]
    """Of a unigram model, by id."""

    def of_type(self, *kinds: TokenType) -> list[int]:
        """Return the ids of tokens of these types."""
        return [number for number, kind in enumerate(self.types) if kind in kinds]


def read_tokens(files: TokenizerFiles) -> TokenTable:
    """Return the tokens, one for each row of the embedding. Raises TokenizerError."""
    rows = files.rows
    texts, scores = _vocabulary(files)
    merged = frozenset(texts)
    texts |= {number: entry["content"] for number, entry in files.added.items()}
    texts = {number: text for number, text in texts.items() if number < rows}
    unknown = _unknown(files)
    has_bytes = bool(files.model.get("byte_fallback"))
    found = map(texts.get, range(rows))
    tokens = [f"[PAD{number}]" if text is None else text for number, text in enumerate(found)]
    types = _types(texts, files.added, rows, unknown, has_bytes=has_bytes)
    if _spaces_are_marks(files):
        _marked_as_typed(tokens, types, merged)
    _check_texts(tokens, files)
    return TokenTable(tokens, types, scores)


def _vocabulary(files: TokenizerFiles) -> tuple[dict[int, str], dict[int, float]]:
    """Texts by id, and scores by id of a unigram model.

    Where one id has two texts (a tab and <0x09> in Gemma), the byte's name is kept: it represents both.
    """
    vocab = files.model["vocab"]
    if isinstance(vocab, list):
        return dict(enumerate(text for text, _ in vocab)), dict(enumerate(score for _, score in vocab))
    texts = {number: text for text, number in reversed(vocab.items())}  # the first of several stays
    if len(texts) == len(vocab):
        return texts, {}
    for text, number in vocab.items():
        if byte_value(text) is not None:
            texts[number] = text
    return texts, {}


def _unknown(files: TokenizerFiles) -> str | int | None:
    """The text (or id, in a unigram model) of the unknown token, where text can become it."""
    if "unk_id" in files.model:
        number: int | None = files.model["unk_id"]
        return number
    text: str | None = files.model.get("unk_token")
    return text if files.model.get("byte_fallback") else None


def _types(
    texts: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
    unknown: str | int | None,
    *,
    has_bytes: bool,
) -> list[TokenType]:
    """Types of all rows; later rules take precedence."""
    types = [TokenType.NORMAL if number in texts else TokenType.UNUSED for number in range(rows)]
    for number, entry in added.items():
        special = entry.get("special") or looks_special(texts[number])
        types[number] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    for number, text in texts.items() if has_bytes or unknown is not None else ():
        if has_bytes and byte_value(text) is not None:
            types[number] = TokenType.BYTE
        if unknown is not None and unknown in (number, text):
            types[number] = TokenType.UNKNOWN
    return types


def looks_special(text: str) -> bool:
    """Whether llama.cpp treats a token as a control token by its text: <|...|> or its full-width form."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def byte_value(text: str) -> int | None:
    """Return the byte of a token such as <0x0A>; None for other tokens."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _spaces_are_marks(files: TokenizerFiles) -> bool:
    return bool(files.model.get("byte_fallback")) or files.model.get("type") == "Unigram"


def _marked_as_typed(tokens: list[str], types: list[TokenType], merged: frozenset[int]) -> None:
    """Adjust added tokens that contain marks, such as Gemma's runs of spaces.

    tokenizer.json matches them only where the text itself contains marks, which nobody types; runs of spaces become
    these tokens by merging. So those that the model can merge are normal tokens. Others are user-defined, and llama.cpp
    matches them before spaces become marks.
    """
    for number, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED and MARK in tokens[number]:
            if number in merged:
                types[number] = TokenType.NORMAL
            else:
                tokens[number] = tokens[number].replace(MARK, " ")


def _check_texts(tokens: Sequence[str], files: TokenizerFiles) -> None:
    """Refuse duplicate texts: llama.cpp aborts the process on them."""
    if _are_texts(tokens):
        return
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        if text in seen:
            raise TokenizerError(f"the tokens {seen[text]} and {number} are both {text!r}, which GGUF cannot hold")
        if not text:
            raise TokenizerError(f"the token {number} of the tokenizer in {files.path} has no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the token {number} is {text!r}, which is not Unicode text") from error
        seen[text] = number


def _are_texts(tokens: Sequence[str]) -> bool:
    """Whether all texts are valid, unique Unicode; much faster than finding the wrong one."""
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        return False
    return all(tokens) and len(set(tokens)) == len(tokens)
