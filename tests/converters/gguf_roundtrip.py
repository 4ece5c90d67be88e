"""The text vocabularies of llama.cpp's source distribution, rebuilt as Hugging Face tokenizers.

A GGUF vocabulary has tokens, types, merges and scores, but not how text is split: that is stated here, as in the
model's own tokenizer.json.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters import gguf
from edgetune_converters.tokenizers.convert import TokenType

_PADDING = re.compile(r"\[PAD\d+\]")
_MARK = "\u2581"


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[一-龥ࠀ-一가-\ud7ff]+"
_ALPHABETS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-"
    "ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = _sequence(
    _split("[\r\n]"), _split(rf"\s?[{_ALPHABETS}]+"), _split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), _split(r"\s+$"),
    _split(_HAN), _DIGITS, _BYTES,
)  # fmt: skip
_DEEPSEEK_CODER = _sequence(_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_HAN), _DIGITS, _BYTES)
_FALCON = _sequence(
    {"type": "Punctuation", "behavior": "Contiguous"}, _GPT2, {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
)  # fmt: skip
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _MARK}, _SPACE_TO_MARK]}


class Source(NamedTuple):
    """The rest of tokenizer.json, beside vocabulary and merges; `pre`: the name that must be recognized."""

    pre: str
    cutter: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    model: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


_FALL_BACK = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
SOURCES = {
    "aquila": Source("gpt-2", _GPT2),
    "baichuan": Source("default", None, _SPACE_TO_MARK, _FALL_BACK),
    "command-r": Source("smollm", _sequence(_DIGITS, _GPT2), _NFC),
    "deepseek-coder": Source("deepseek-coder", _DEEPSEEK_CODER),
    "deepseek-llm": Source("deepseek-llm", _DEEPSEEK_LLM),
    "falcon": Source("falcon", _FALCON),
    "gemma-4": Source("sarvam-moe", None, _SPACE_TO_MARK, _FALL_BACK),
    "gpt-2": Source("gpt-2", _GPT2),
    "gpt-neox": Source("gpt-2", _GPT2, _NFC),
    "llama-bpe": Source("llama-bpe", _sequence(_split(_LLAMA3), _BYTES), None, {"ignore_merges": True}),
    "llama-spm": Source("default", None, _LLAMA2, _FALL_BACK),
    "mpt": Source("gpt-2", _GPT2, _NFC),
    "nomic-bert-moe": Source("default", _sequence({"type": "WhitespaceSplit"}, {
        "type": "Metaspace", "replacement": _MARK, "prepend_scheme": "always", "split": True})),
    "phi-3": Source("default", None, _LLAMA2, _FALL_BACK),
    "qwen2": Source("qwen2", _sequence(_split(_LLAMA3.replace("{1,3}", "")), _BYTES), _NFC),
    "qwen35": Source("qwen35", _sequence(_split(_QWEN35), _BYTES)),
    "refact": Source("smollm", _sequence(_DIGITS, _GPT2)),
    "starcoder": Source("smollm", _sequence(_DIGITS, _GPT2)),
}  # fmt: skip


class Rebuilt(NamedTuple):
    """A vocabulary as a tokenizer directory, and the texts whose ids llama.cpp's own tests state."""

    directory: Path
    rows: int
    stated: list[tuple[str, list[int]]]


def rebuild(source: Path, name: str, directory: Path) -> Rebuilt:
    """Write tokenizer.json and tokenizer_config.json for ggml-vocab-NAME.gguf."""
    file = source / f"ggml-vocab-{name}.gguf"
    metadata = gguf.read(file).metadata
    found: dict[str, Any] = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokenizer = {
        "version": "1.0",
        "added_tokens": _added(found),
        "normalizer": _normalizer(SOURCES[name], found),
        "pre_tokenizer": SOURCES[name].cutter,
        "post_processor": _post_processor(found),
        "model": _model(SOURCES[name], found),
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {f"{role}_token": _text(found, name) for role, name in _ROLES.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Rebuilt(directory, len(found["tokens"]), stated_ids(file))


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _text(found: dict[str, Any], role: str) -> str | None:
    number = found.get(f"{role}_token_id")
    return None if number is None else str(found["tokens"][number])


def _added(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Control tokens become special added tokens, user-defined ones plain added tokens; padding is left out.

    BOS and EOS are special too, which some of the files type as normal.
    """
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False, TokenType.UNKNOWN: True, TokenType.NORMAL: True}
    ends = {found.get(f"{role}_token_id") for role in ("bos", "eos")}
    return [
        {
            "id": number, "content": text, "special": kinds[TokenType(kind)], "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for number, (text, kind) in enumerate(zip(found["tokens"], found["token_type"], strict=True))
        if not _PADDING.fullmatch(text) and (number in ends if kind == TokenType.NORMAL else kind in kinds)
    ]  # fmt: skip


def _normalizer(source: Source, found: dict[str, Any]) -> dict[str, Any] | None:
    """For unigram the table of replacements comes from the file."""
    if "precompiled_charsmap" not in found:
        return source.normalizer
    table = base64.b64encode(bytes(number & 255 for number in found["precompiled_charsmap"])).decode()
    return {"type": "Precompiled", "precompiled_charsmap": table}


def _post_processor(found: dict[str, Any]) -> dict[str, Any] | None:
    """BOS and EOS around the text where the file says so."""
    ends = {role: _text(found, role) if found.get(f"add_{role}_token") else None for role in ("bos", "eos")}
    if not any(ends.values()):
        return None
    tokens = {text: {"id": text, "ids": [found[f"{role}_token_id"]], "tokens": [text]} for role, text in ends.items()}
    special = {role: [{"SpecialToken": {"id": text, "type_id": 0}}] if text else [] for role, text in ends.items()}
    single = [*special["bos"], {"Sequence": {"id": "A", "type_id": 0}}, *special["eos"]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    kept = {text: token for text, token in tokens.items() if text}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": kept}


def _model(source: Source, found: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = found["tokens"]
    if found["model"] == "t5":
        pieces = [[text, score] for text, score in zip(tokens, found["scores"], strict=True)]
        return {"type": "Unigram", "unk_id": found["unknown_token_id"], "vocab": pieces}
    added = {entry["id"] for entry in _added(found)}
    last = max(number for number, kind in enumerate(found["token_type"]) if number not in added and kind == 1)
    vocab = {
        text: number
        for number, text in enumerate(tokens)
        if not _PADDING.fullmatch(text) and (number not in added or number < last)
    }
    merges = (
        [entry.split(" ", 1) for entry in found["merges"]] if "merges" in found else _merges(vocab, found["scores"])
    )
    return {"type": "BPE", "vocab": vocab, "merges": merges, **source.model}


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[list[str]]:
    """Every way of merging two tokens into a third, the best third first, as transformers makes them from scores."""
    ordered = sorted(vocab, key=lambda text: -scores[vocab[text]])
    return [
        [text[:cut], text[cut:]]
        for text in ordered
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]


def stated_ids(file: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids; none for the few vocabularies without."""
    texts, ids = (file.with_name(file.name + ending) for ending in (".inp", ".out"))
    if not texts.is_file():
        return []
    separated = texts.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = ids.read_text(encoding="utf-8").splitlines()
    # the last text ends with the separator's line
    return [(text, [int(id_) for id_ in line.split()]) for text, line in zip(separated, lines, strict=False)]
