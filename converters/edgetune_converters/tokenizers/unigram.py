"""Unigram (T5, XLM-R): of all ways to split a text into tokens, the likeliest. llama.cpp's model for it is t5."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, boolean, f32s
from edgetune_converters.gguf.values import ValueKind as ValueKind
from edgetune_converters.tokenizers.candidate import Candidate
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.vocabulary import MARK, TokenTable, TokenType

_MARKS = "it replaces combining marks one by one as SentencePiece does, the tokenizers library whole characters at once"
# Replace steps that collapse several spaces, or strip them from the ends
_SPACES = {(" {2,}", " "), (" {2,}", MARK), (r"\A +| +\z", "")}


def candidates(files: TokenizerFiles, rows: TokenTable) -> Iterator[Candidate]:
    """Yield the one way in which llama.cpp may split as this tokenizer does. Raises TokenizerError."""
    if files.model.get("byte_fallback"):
        raise TokenizerError(
            f"the unigram tokenizer in {files.path} falls back to bytes; llama.cpp's unigram model does not"
        )
    if not rows.of_type(TokenType.UNKNOWN):
        raise TokenizerError(f"the unigram tokenizer in {files.path} has no unknown token")
    charsmap, merges_spaces = _normalizer(files.tokenizer.get("normalizer"))
    prefix, splits = _cutter(files.tokenizer.get("pre_tokenizer"))
    metadata = {
        "tokenizer.ggml.scores": f32s(_scores(rows)),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(merges_spaces or splits),
    }
    if charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = Value(ValueKind.ARRAY, list(charsmap), ValueKind.U8)
    notes = ("the tokenizer cuts at every white space, llama.cpp only at those that its table names",) if splits else ()
    yield Candidate("t5", "default", metadata, "", "plain" if splits else "", (_MARKS,) if charsmap else (), notes)


def _scores(rows: TokenTable) -> list[float]:
    """Scores by id. Padding rows can be matched in a text too: they get a score with which they are never chosen."""
    found = [rows.scores.get(number, 0.0) for number in range(len(rows.tokens))]
    never = 1e3 * min([-1.0, *(score for score in found if math.isfinite(score))])
    return [never if kind == TokenType.UNUSED else score for score, kind in zip(found, rows.types, strict=True)]


def _normalizer(normalizer: Any) -> tuple[bytes, bool]:
    """The table of replacements (empty without one), and whether several spaces become one."""
    charsmap, merges_spaces = b"", False
    for part in _parts(normalizer, "normalizers"):
        if part.get("type") == "Precompiled":
            charsmap = _charsmap(part)
        elif part.get("type") == "Replace" and _replaced(part) in _SPACES:
            merges_spaces = True
        elif part.get("type") != "Strip":  # spaces at the ends are removed together with double ones
            raise _unknown(part)
    return charsmap, merges_spaces


def _replaced(part: Mapping[str, Any]) -> tuple[str, str]:
    pattern = part.get("pattern")
    return str(pattern.get("Regex") if isinstance(pattern, dict) else pattern), str(part.get("content"))


def _charsmap(part: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise TokenizerError(f"the tokenizer's precompiled_charsmap is damaged: {error}") from error


def _cutter(cutter: Any) -> tuple[bool, bool]:
    """Whether a space is added before a text, and whether words are split at white space."""
    parts = _parts(cutter, "pretokenizers")
    types = [part.get("type") for part in parts]
    if types not in (["WhitespaceSplit", "Metaspace"], ["Metaspace"]) or parts[-1].get("replacement") != MARK:
        raise _unknown(cutter)
    return parts[-1].get("prepend_scheme", "always") != "never", len(parts) == 2


def _unknown(step: Any) -> TokenizerError:
    return TokenizerError(f"this unigram tokenizer prepares text in a way that llama.cpp does not: {step!r}")


def _parts(entry: Any, inner: str) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, with nested sequences flattened."""
    if not isinstance(entry, dict):
        return []
    if entry.get("type") != "Sequence":
        return [entry]
    return [part for each in entry.get(inner, []) for part in _parts(each, inner)]
