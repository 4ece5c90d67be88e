"""BPE on characters with byte fallback, converted from SentencePiece (Llama 2, Mistral, Gemma).

llama.cpp has two models for it. Its SentencePiece model merges by score and adds a space before a text by itself. Its
BPE on characters (`sarvam-moe`) merges by rank as tokenizer.json does, but never across a line end, and adds no space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import boolean, f32s, strings
from edgetune_converters.tokenizers.byte_level import merges
from edgetune_converters.tokenizers.candidate import Candidate
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.normalization import Space
from edgetune_converters.tokenizers.vocabulary import MARK, TokenTable, TokenType

_BY_RANK = "sarvam-moe"


def candidates(files: TokenizerFiles, rows: TokenTable) -> Iterator[Candidate]:
    """Yield the ways in which llama.cpp may merge as this tokenizer does, the likeliest first.

    Raises TokenizerError when no way is known.
    """
    missing = 256 - len(rows.of_type(TokenType.BYTE))
    if missing:
        raise TokenizerError(f"the tokenizer in {files.path} has byte_fallback but lacks {missing} of 256 byte tokens")
    spaces = _spaces(files.tokenizer)
    pairs = merges(files)
    why = _not_by_score(pairs, rows)
    if why is None:
        yield _by_score(pairs, rows, spaces)
    if spaces.added:
        if why is not None:
            raise TokenizerError(
                f"the tokenizer in {files.path} cannot be written as SentencePiece scores: {why}",
                "A byte-level BPE tokenizer has no such limit",
            )
        return
    yield _by_rank(pairs, spaces)


def _by_score(pairs: Sequence[tuple[str, str]], rows: TokenTable, spaces: _Spaces) -> Candidate:
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(pairs)))}
    worst = -float(len(pairs) + 1)
    metadata = {
        "tokenizer.ggml.scores": f32s([-float(ranks[text]) if text in ranks else worst for text in rows.tokens]),
        "tokenizer.ggml.add_space_prefix": boolean(spaces.added),
    }
    return Candidate("llama", "default", metadata, "", spaces.space, spaces.limits, spaces.notes)


def _by_rank(pairs: Sequence[tuple[str, str]], spaces: _Spaces) -> Candidate:
    """As BPE by rank; only merges across a line end are lost."""
    crossing = any("\n" in left + right and (left + right).strip("\n") for left, right in pairs)
    limits = ("it does not merge a line end with other text",) if crossing else ()
    metadata = {
        "tokenizer.ggml.merges": strings([f"{left} {right}" for left, right in pairs]),
        "tokenizer.ggml.add_space_prefix": boolean(False),
    }
    return Candidate("gpt2", _BY_RANK, metadata, "", spaces.space, (*spaces.limits, *limits), spaces.notes)


def _not_by_score(pairs: Sequence[tuple[str, str]], rows: TokenTable) -> str | None:
    """Why merging by score (llama.cpp) differs from merging by rank (tokenizer.json); None where it does not.

    llama.cpp merges any two neighbors whose concatenation is a token, the best token first. That is the same only if
    every way of splitting a token is among its merges, and no token's merges are interleaved with another's.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    known = set(pairs)
    normal = {rows.tokens[number] for number in rows.of_type(TokenType.NORMAL)}
    for text in sorted(normal):
        for cut in range(1, len(text)):
            split = (text[:cut], text[cut:])
            if split not in known and split[0] in normal and split[1] in normal:
                return f"{split[0]!r} and {split[1]!r} may not be merged into {text!r}"
    previous = -1
    for text, found in sorted(ranks.items(), key=lambda item: item[1][0]):
        if found[0] < previous:
            return f"the merges into {text!r} are interleaved with those of another token"
        previous = found[-1]
    return None


# -- spaces ------------------------------------------------------------------------------------------------------------


class _Spaces(NamedTuple):
    """Whether llama.cpp adds a space before a text, and the normalization where it should not or does not."""

    added: bool
    space: Space = ""
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREPEND = {"type": "Prepend", "prepend": MARK}
# prepend_scheme of Metaspace
_SCHEMES = {
    "always": _Spaces(
        True,
        "spare",
        ("the tokenizer puts no space before a text that begins with one, llama.cpp does",),
        ("it has no single space as a text or between two special tokens",),
    ),
    "first": _Spaces(False, "first", ("the tokenizer puts a space before a text, llama.cpp does not",)),
    "never": _Spaces(False),
}


def _spaces(tokenizer: Mapping[str, Any]) -> _Spaces:
    """How the tokenizer turns spaces into marks. Raises TokenizerError for unknown ways."""
    normalizer, cutter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    parts = _flat(normalizer)
    if _cuts_nothing(cutter) and parts in ([_SPACE_TO_MARK], [_PREPEND, _SPACE_TO_MARK]):
        return _Spaces(_PREPEND in parts)
    if not parts and isinstance(cutter, dict) and cutter.get("type") == "Metaspace" and cutter.get("split") is False:
        scheme = cutter.get("prepend_scheme", "always")
        if cutter.get("replacement") == MARK and scheme in _SCHEMES:
            return _SCHEMES[scheme]
    raise TokenizerError(
        f"this tokenizer prepares text in a way that llama.cpp is not known to reproduce: {normalizer!r}, {cutter!r}"
    )


def marks_first(tokenizer: Mapping[str, Any]) -> bool:
    """Whether spaces become marks before added tokens are matched in normalized text."""
    return _SPACE_TO_MARK in _flat(tokenizer.get("normalizer"))


def _cuts_nothing(cutter: Any) -> bool:
    """Whether there is no pre-tokenizer, or one that splits at spaces that the normalizer removed (Gemma 3)."""
    if cutter is None:
        return True
    at_spaces = isinstance(cutter, dict) and cutter.get("type") == "Split" and cutter.get("pattern") == {"String": " "}
    return at_spaces and cutter.get("behavior") != "Removed" and not cutter.get("invert")


def _flat(normalizer: Any) -> list[Any]:
    if normalizer is None:
        return []
    return list(normalizer.get("normalizers", [normalizer])) if isinstance(normalizer, dict) else [normalizer]
