"""Recognize how a byte-level tokenizer.json splits text before merging.

llama.cpp implements a closed list of pre-tokenizers and selects one by name. Each row pairs such a name with the steps
that have the same effect; anything else is refused. Several names of llama.cpp mean the same splits (`SAME`): each is
recognized under the one name. Not included: default (llama.cpp's guess for files that name
none), whitespace and hybriddna (not byte-level BPE), afmoe (its tokenizer.json is unknown to us), and gemma4, which
`sentencepiece` writes differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError

Steps = tuple[str, ...]

# the split inside ByteLevel(use_regex=True)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_THREE_DIGITS = r"\p{N}{1,3}"
_GROUPED_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"
_PUNCTUATION = "Punctuation:"
_BYTES = "after bytes: "  # a step that reads the letters of the bytes instead of the text

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORD}|{_THREE_DIGITS}{_SIGNS}{_ENDS}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORD}|{_DIGIT}{_SIGNS}{_ENDS}"
_LADDER = r"|\s*[\r\n]+|" + "".join(rf"\s{{{width}}}(?!\S)|" for width in (512, 256, 128, 64, 32, 16, 8, 4))
_LADDER += r"\s{1,2}(?!\S)|\s{1}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = f"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|{_THREE_DIGITS}{_CASED_SIGNS}{_ENDS}"
_YOUTU = _GPT4O.replace(_THREE_DIGITS, _DIGIT)
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}|{_DIGIT}{_CASED_SIGNS}{_ENDS}"
_NOT_HAN = r"&&[^\p{Han}]]"
_KIMI_WORDS = _GPT4O.replace(_UPPER, _UPPER[:-1] + _NOT_HAN).replace(_LOWER, _LOWER[:-1] + _NOT_HAN)
_KIMI = r"[\p{Han}]+|" + _KIMI_WORDS.replace(_CASED_SIGNS, _SIGNS)

_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_SIGN = '[!"#$' + r"%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_WORD = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*{_ENDS}"
_SPARK = rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-\ud7ff]+"
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-"
    "ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    "[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN_AND_HANGUL,
)  # fmt: skip
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

_CASES = "it takes letters outside ASCII for both upper and lower case"
_ASCII_DIGITS = "it groups ASCII digits only"
_WIDE_SPACE = "it takes an ideographic space (U+3000) for nothing but a space"
_MARKS = "it ends a word before a combining mark"


class PreTokenizer(NamedTuple):
    """A recognized pre-tokenizer: llama.cpp's name, whether it implies `ignore_merges`, and its known differences."""

    name: str
    ignore_merges: bool = False
    limits: tuple[str, ...] = ()


class PreTokenizerRow(NamedTuple):
    """A name of llama.cpp, the steps that have the same effect, `ignore_merges` as it implies it, and its limits."""

    name: str
    steps: Steps
    ignore_merges: bool = False
    limits: tuple[str, ...] = ()


# of several rows with the same steps, the first that is verified is used
TABLE = (
    PreTokenizerRow("gpt-2", (GPT2,)),
    PreTokenizerRow("smollm", (_DIGIT, GPT2)),
    PreTokenizerRow("llama-bpe", (_LLAMA3,), True),
    PreTokenizerRow("smaug-bpe", (_LLAMA3,)),
    PreTokenizerRow("jais-2", (f"{_CONTRACTIONS}|{_WORD}|{_THREE_DIGITS}{_SIGNS}{_LADDER}",)),
    PreTokenizerRow("minicpm5", (_THREE_DIGITS, f"{_CONTRACTIONS}|{_WORD}|{_DIGITS}{_SIGNS}{_ENDS}"), True),
    PreTokenizerRow("qwen2", (_QWEN2,)),
    PreTokenizerRow("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    PreTokenizerRow("ufakzeka", (f"{_WORD}|{_DIGIT}{_SIGNS}{_ENDS}",)),
    PreTokenizerRow("qwen35", (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _ENDS,)),
    PreTokenizerRow("seed-coder", (f"{_CONTRACTIONS}|{_WORD}|" + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _ENDS,)),
    PreTokenizerRow("bailingmoe", (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreTokenizerRow("exaone-moe", (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreTokenizerRow("tekken", (_TEKKEN,), True, (_CASES, _MARKS)),
    PreTokenizerRow("gpt-4o", (_GPT4O,), False, (_CASES, _MARKS)),
    PreTokenizerRow("granite-embed-multi-97m", (_GPT4O,), True, (_CASES,)),
    PreTokenizerRow("tiny_aya", (_GROUPED_DIGITS, _GPT4O), False, (_CASES,)),
    PreTokenizerRow("kimi-k2", (_KIMI,), False, (_CASES, _MARKS)),
    PreTokenizerRow("youtu", (_YOUTU_SCRIPTS, _YOUTU), True, (_CASES,)),
    PreTokenizerRow("deepseek-llm", (*_DEEPSEEK_LLM, _DIGITS), False, (_WIDE_SPACE,)),
    PreTokenizerRow("deepseek-llm", (*_DEEPSEEK_LLM, _DIGIT), False, (_WIDE_SPACE,)),
    PreTokenizerRow("deepseek-coder", (
        "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, _DIGIT), False, (_WIDE_SPACE,)),
    PreTokenizerRow("deepseek-v3", (_THREE_DIGITS, _KANA, _DEEPSEEK3)),
    PreTokenizerRow("spark2_5", (_THREE_DIGITS, _KANA, _SPARK, _DIGIT)),
    PreTokenizerRow("superbpe", (_DIGITS, r"(?=(\d{3})+(?!\d))"), False, (_ASCII_DIGITS,)),
    PreTokenizerRow("bloom", (_BLOOM,)),
    PreTokenizerRow("viking", (_BLOOM, _DIGIT)),
    PreTokenizerRow("falcon", (_PUNCTUATION + "Contiguous", GPT2, _BYTES + _DIGITS, _BYTES + "[0-9][0-9][0-9]")),
    PreTokenizerRow("chameleon", (
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", _DIGIT,
        _PUNCTUATION + "Isolated", GPT2)),
)  # fmt: skip

# names of llama.cpp with the splits of another one
SAME = {
    "gpt-2": "mpt olmo jais phi-2 trillion granite-docling roberta-bpe jina-es jina-de jina-v1-en",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "qwen2": "stablelm2 hunyuan grok-2 solar-open megrez deepseek-r1-qwen",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 lfm2 pixtral",
    "smaug-bpe": "dbrx chatglm-bpe glm4",
    "bloom": "poro-chat gpt3-finnish",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "gpt-4o": "llama4 minimax-m2 kanana2",
    "tiny_aya": "cohere2moe",
}


def row_named(name: str) -> PreTokenizerRow | None:
    """Return the row of a name of llama.cpp, also of one that means the same splits; None for an unknown name."""
    known = next((row for row, others in SAME.items() if name in others.split()), name)
    return next((row for row in TABLE if row.name == known), None)


def as_tokenizer_json(steps: Steps, *, add_prefix_space: bool) -> dict[str, Any]:
    """Return steps as the `pre_tokenizer` of a tokenizer.json, from which `recognize` finds the same steps."""
    before = [step for step in steps if not step.startswith(_BYTES)]
    own = before.count(GPT2)  # the last step of the ByteLevel part itself
    parts = [_as_part(step) for step in before if step != GPT2]
    parts.append(
        {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": bool(own)}
    )
    parts += [_as_part(step.removeprefix(_BYTES)) for step in steps if step.startswith(_BYTES)]
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def _as_part(step: str) -> dict[str, Any]:
    if step in (_DIGIT, _DIGITS):
        return {"type": "Digits", "individual_digits": step == _DIGIT}
    if step.startswith(_PUNCTUATION):
        return {"type": "Punctuation", "behavior": step.removeprefix(_PUNCTUATION)}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def recognize(tokenizer: Mapping[str, Any]) -> list[PreTokenizer]:
    """Return the pre-tokenizers of llama.cpp that split as a byte-level tokenizer.json does, the likeliest first.

    Raises TokenizerError with the steps that were found.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    rows = [row for row in TABLE if _plain(row.steps) == _plain(steps)]
    if not rows:
        known = ", ".join(row.name for row in TABLE)
        listed = "".join(f"\n  {number}. {step}" for number, step in enumerate(steps, 1)) or " by nothing at all"
        raise TokenizerError(
            f"this tokenizer cuts text in a way that no pre-tokenizer of llama.cpp is known to reproduce:{listed}",
            f"Known: {known}",
        )
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    rows.sort(key=lambda row: (row.ignore_merges != ignore, len(row.limits)))
    return [PreTokenizer(row.name, row.ignore_merges, row.limits) for row in rows]


def _plain(steps: Steps) -> Steps:
    """Steps with line ends written as escapes, so that both spellings are equal."""
    return tuple(step.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t") for step in steps)


def adds_prefix_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a ByteLevel step adds a space before each piece of text."""
    return any(part.get("add_prefix_space") for part in _parts(tokenizer.get("pre_tokenizer")) if _is_bytes(part))


def _parts(entry: Any) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer, with nested sequences flattened."""
    if not isinstance(entry, dict):
        return []
    if entry.get("type") != "Sequence":
        return [entry]
    return [part for inner in entry.get("pretokenizers", []) for part in _parts(inner)]


def _is_bytes(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "ByteLevel"


def _steps(entry: Any) -> list[str]:
    """A pre-tokenizer as canonical steps; an unknown one is named by its type."""
    steps: list[str] = []
    prefix = ""
    for part in _parts(entry):
        steps += [prefix + step for step in _STEPS.get(str(part.get("type")), _unknown_step)(part)]
        prefix = _BYTES if _is_bytes(part) else prefix
    return steps


def _split_steps(entry: Mapping[str, Any]) -> list[str]:
    """The regular expression of a Split whose matches become pieces: isolated, or removed when inverted."""
    pattern = entry.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    behavior, invert = entry.get("behavior"), bool(entry.get("invert"))
    if regex is None or (behavior, invert) not in (("Isolated", False), ("Removed", True)):
        return [f"Split:{pattern}:{behavior}:{invert}"]
    return [str(regex)]


def _unknown_step(entry: Mapping[str, Any]) -> list[str]:
    return [str(dict(entry))]


_STEPS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "ByteLevel": lambda part: [GPT2] if part.get("use_regex", True) else [],
    "Digits": lambda part: [_DIGIT if part.get("individual_digits") else _DIGITS],
    "Punctuation": lambda part: [_PUNCTUATION + str(part.get("behavior", "Isolated"))],
    "Split": _split_steps,
}
