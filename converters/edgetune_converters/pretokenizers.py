"""Recognising how a tokenizer cuts text before merging, by what tokenizer.json says and not by a hash of results.

llama.cpp implements a closed list of pre-tokenizers and selects one by name. Each row pairs such a name with the steps
that have the same effect; what is in no row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError

Steps = tuple[str, ...]

# the split inside ByteLevel(use_regex=True)
_GPT2 = "ByteLevel"
_DIGITS = "Digits:individual"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """A recognised pre-tokenizer: llama.cpp's name, whether that name implies `ignore_merges`, and a normalizer."""

    name: str
    ignore_merges: bool
    normalizer: str = ""


class _Row(NamedTuple):
    name: str
    steps: Steps
    ignore_merges: bool = False


_TABLE = (
    _Row("gpt-2", (_GPT2,)),
    _Row("smollm", (_DIGITS, _GPT2)),
    _Row("llama-bpe", (_CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _REST,), True),
    _Row("smaug-bpe", (_CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _REST,)),
    _Row("qwen2", (_CONTRACTIONS + _WORD + r"\p{N}" + _REST,)),
    _Row("qwen35", (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    _Row("tekken", (_CASED[0] + "|" + _CASED[1] + r"|\p{N}" + _CASED_REST,), True),
    _Row("gpt-4o", (
        _CASED[0] + _CONTRACTIONS + "?|" + _CASED[1] + _CONTRACTIONS + r"?|\p{N}{1,3}" + _CASED_REST,)),
    _Row("deepseek-v3", (
        r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^" "\r\n" r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[" "\r\n" r"]*|\s*[" "\r\n" r"]+|\s+(?!\S)|\s+")),
)  # fmt: skip


def recognise(tokenizer: Mapping[str, Any]) -> PreTokenizer:
    """The pre-tokenizer of a byte-level BPE tokenizer.json. Errors: TokenizerError with the steps that were found."""
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    rows = [row for row in _TABLE if row.steps == steps]
    if not rows:
        known = ", ".join(row.name for row in _TABLE)
        raise TokenizerError(
            f"this tokenizer cuts text in a way that no pre-tokenizer of llama.cpp is known to reproduce: {steps!r}",
            f"Known: {known}",
        )
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    row = next((row for row in rows if row.ignore_merges == ignore), rows[0])
    return PreTokenizer(row.name, row.ignore_merges, _unicode_form(tokenizer.get("normalizer")))


def _steps(entry: Any) -> list[str]:
    """A pre-tokenizer as a list of canonical steps; one that is not understood is named by its type."""
    if not isinstance(entry, dict):
        return [] if entry is None else [repr(entry)]
    kind = entry.get("type")
    if kind == "Sequence":
        return [step for part in entry.get("pretokenizers", []) for step in _steps(part)]
    if kind == "ByteLevel":
        return _byte_level_steps(entry)
    if kind == "Split":
        return [_split_step(entry)]
    if kind == "Digits" and entry.get("individual_digits"):
        return [_DIGITS]
    return [str(kind)]


def _byte_level_steps(entry: Mapping[str, Any]) -> list[str]:
    if entry.get("add_prefix_space"):
        return ["ByteLevel:add_prefix_space"]
    return [_GPT2] if entry.get("use_regex", True) else []


def _split_step(entry: Mapping[str, Any]) -> str:
    """The regular expression of a Split whose matches become pieces: isolated, or removed when inverted."""
    pattern = entry.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    behavior, invert = entry.get("behavior"), bool(entry.get("invert"))
    if regex is None or (behavior, invert) not in (("Isolated", False), ("Removed", True)):
        return f"Split:{pattern}:{behavior}:{invert}"
    return str(regex)


def _unicode_form(normalizer: Any) -> str:
    """NFC and its kin are told to the runtime; anything else in front of a byte-level BPE is refused."""
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    kinds = [part.get("type") for part in parts]
    if not kinds:
        return ""
    if len(kinds) == 1 and kinds[0] in ("NFC", "NFD", "NFKC", "NFKD"):
        return str(kinds[0])
    raise TokenizerError(f"this tokenizer normalizes text in a way that cannot be carried: {kinds}")


class SpacePrefix(NamedTuple):
    """Whether a space is put before a text, and a note where llama.cpp does it in more places than the tokenizer."""

    added: bool
    note: str = ""


_MARK = "\u2581"
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_PREPEND = {"type": "Prepend", "prepend": _MARK}
_METASPACE_NOTES = {
    "always": "the tokenizer puts no space before a text that begins with one, llama.cpp does",
    "first": "the tokenizer puts a space before a text only at its very beginning and only where there is none, "
    "llama.cpp also after each special token",
    "never": "",
}


def space_prefix(tokenizer: Mapping[str, Any]) -> SpacePrefix:
    """How a SentencePiece-like tokenizer turns spaces into marks. Errors: TokenizerError for ways not known here."""
    normalizer, cutter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    parts = _flat(normalizer)
    if cutter is None and parts in ([_SPACE_TO_MARK], [_PREPEND, _SPACE_TO_MARK]):
        return SpacePrefix(_PREPEND in parts)
    if not parts and isinstance(cutter, dict) and cutter.get("type") == "Metaspace" and cutter.get("split") is False:
        return _metaspace(cutter)
    raise TokenizerError(
        f"this tokenizer prepares text in a way that llama.cpp is not known to reproduce: {normalizer!r}, {cutter!r}"
    )


def _flat(normalizer: Any) -> list[Any]:
    if normalizer is None:
        return []
    return list(normalizer.get("normalizers", [normalizer])) if isinstance(normalizer, dict) else [normalizer]


def _metaspace(cutter: Mapping[str, Any]) -> SpacePrefix:
    scheme = cutter.get("prepend_scheme", "always")
    if cutter.get("replacement") != _MARK or scheme not in _METASPACE_NOTES:
        raise TokenizerError(f"this tokenizer's Metaspace is not known: {dict(cutter)!r}")
    return SpacePrefix(scheme != "never", _METASPACE_NOTES[scheme])
