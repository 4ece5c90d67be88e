"""Rebuild the files of a Hugging Face tokenizer from the vocabulary of a GGUF file.

The inverse of `convert`. A vocabulary states tokens, types, merges and scores; how text is split follows from the names
of llama.cpp's model and pre-tokenizer. What is rebuilt is verified: it must give llama.cpp's ids.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Value
from edgetune_converters.tokenizers import pretokenizers, sentencepiece_model
from edgetune_converters.tokenizers.chat_files import DEFAULT, TEMPLATE_FILE
from edgetune_converters.tokenizers.files import read_tokenizer_files
from edgetune_converters.tokenizers.llama_special_tokens import SPECIAL_TEXTS
from edgetune_converters.tokenizers.normalization import Normalization
from edgetune_converters.tokenizers.special import GGUF_ROLES
from edgetune_converters.tokenizers.verify_ids import adds_bos_and_eos, verify
from edgetune_converters.tokenizers.vocabulary import MARK, TokenType

Metadata = Mapping[str, Any]
Json = dict[str, Any]

_HINT = "Give the Hugging Face model that the file was made from"
_PREFIX = "tokenizer.ggml."
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_BY_RANK = ("sarvam-moe", "gemma4")  # names of BPE on characters with byte fallback, merged by rank
_STRIPS = {"lstrip": keys.LSTRIP, "rstrip": keys.RSTRIP}
_COLLIDING = "it takes {} for special tokens, which the merges produce from plain text"


def write_tokenizer(metadata: Metadata, typed: Mapping[str, Value], context: int | None, directory: Path) -> list[str]:
    """Write the tokenizer's files and the chat templates of a GGUF file, and return remarks.

    Args:
        metadata: All metadata of the file, as plain values.
        typed: Its `tokenizer.*` keys with their GGUF types, with which llama.cpp is asked.
        context: The length of the context, for `model_max_length`.
        directory: Where the files go.

    Raises:
        TokenizerError: The vocabulary is of a kind that has no tokenizer.json, or the ids are not llama.cpp's.
    """
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError("the GGUF file holds no tokens", _HINT)
    ends = adds_bos_and_eos(typed) or (bool(metadata.get(f"{_PREFIX}add_bos_token")), False)
    tokenizer, limits = _tokenizer_json(metadata, ends)
    _write(directory / "tokenizer.json", tokenizer)
    _write(directory / "tokenizer_config.json", _tokenizer_config(metadata, ends, context))
    write_templates(metadata, directory)
    return _verify(directory, metadata, typed, limits)


def generation_config(metadata: Metadata) -> Json:
    """Return generation_config.json: BOS, padding, and every stop token that the file states."""
    stops = [metadata.get(f"{_PREFIX}{key}_token_id") for key in ("eos", "eot", "eom")]
    listed = [number for number in [*stops, *metadata.get(keys.STOPS, ())] if type(number) is int]
    found = {f"{name}_token_id": metadata.get(f"{_PREFIX}{key}_token_id") for key, name in GGUF_ROLES.items()}
    stated = {key: found[key] for key in ("bos_token_id", "pad_token_id") if found.get(key) is not None}
    unique = list(dict.fromkeys(listed))
    return stated | ({"eos_token_id": unique[0] if len(unique) == 1 else unique} if unique else {})


def _verify(directory: Path, metadata: Metadata, typed: Mapping[str, Value], limits: list[str]) -> list[str]:
    """Compare the ids with llama.cpp's on a corpus. Differences without a known reason are an error."""
    files = read_tokenizer_files(directory, {}, len(metadata[f"{_PREFIX}tokens"]))
    found = verify(files, typed, Normalization.from_metadata(metadata), [])
    if found is None:
        return ["the ids of the rebuilt tokenizer are not verified: llama.cpp cannot be loaded here"]
    if not found.differences:
        return []
    said = f"{len(found.differences)} of {found.compared} texts differ, the first {found.differences[0]}"
    if not limits:
        raise TokenizerError(f"the tokenizer cannot be rebuilt from the GGUF file: {said}", _HINT)
    return [f"llama.cpp cuts text differently from the rebuilt tokenizer, as {' and '.join(limits)}: {said}"]


def _write(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def write_templates(metadata: Metadata, directory: Path) -> None:
    """Write the default chat template, and those with names of their own where transformers looks for them."""
    prefix = "tokenizer.chat_template"
    for key, text in metadata.items():
        name = DEFAULT if key == prefix else key.removeprefix(f"{prefix}.")
        if not isinstance(text, str) or not (key == prefix or key.startswith(f"{prefix}.")) or not _is_file_name(name):
            continue
        path = (
            directory / TEMPLATE_FILE if name == DEFAULT else directory / "additional_chat_templates" / f"{name}.jinja"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _is_file_name(name: str) -> bool:
    return bool(name) and not set(name) & set("/\\\0") and not name.startswith(".")


def _tokenizer_config(metadata: Metadata, ends: tuple[bool, bool], context: int | None) -> Json:
    """Return tokenizer_config.json: special tokens by text, whether BOS and EOS are added, and the context."""
    tokens = metadata[f"{_PREFIX}tokens"]
    named = {}
    for key, name in GGUF_ROLES.items():
        number = metadata.get(f"{_PREFIX}{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            named[f"{name}_token"] = tokens[number]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # that of transformers which takes tokenizer.json as it is
        "add_bos_token": ends[0],
        "add_eos_token": ends[1],
        "clean_up_tokenization_spaces": False,
        **({} if context is None else {"model_max_length": context}),
        **named,
    }


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def _tokenizer_json(metadata: Metadata, ends: tuple[bool, bool]) -> tuple[Json, list[str]]:
    """Return tokenizer.json, and known reasons for ids that differ from llama.cpp's."""
    model, pre = (str(metadata.get(f"{_PREFIX}{key}", "default")) for key in ("model", "pre"))
    kind = "by rank" if pre in _BY_RANK or model in _BY_RANK else model
    if kind not in _KINDS:
        raise TokenizerError(f"a vocabulary of the kind {model!r} cannot be rebuilt as a tokenizer.json", _HINT)
    parts, limits = _KINDS[kind](metadata)
    added, colliding = _added_tokens(metadata)
    limits += [_COLLIDING.format(", ".join(map(repr, colliding[:3])))] if colliding else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(metadata, ends, byte_level=kind == "gpt2"),
        **parts,
    }, limits


def _types(metadata: Metadata) -> list[int]:
    tokens = metadata[f"{_PREFIX}tokens"]
    types = metadata.get(f"{_PREFIX}token_type") or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"the GGUF file holds {len(tokens)} tokens and {len(types)} types of tokens", _HINT)
    return list(types)


def _vocab(metadata: Metadata) -> dict[str, int]:
    """Return token -> id without the rows that hold no token."""
    rows = zip(metadata[f"{_PREFIX}tokens"], _types(metadata), strict=True)
    return {text: number for number, (text, kind) in enumerate(rows) if kind != TokenType.UNUSED or not _is_blank(text)}


def _is_blank(text: str) -> bool:
    """Whether a row of the type UNUSED is padding, which converters name so."""
    return text.startswith(("[PAD", "[UNREACHABLE"))


def _added_tokens(metadata: Metadata) -> tuple[list[Json], list[str]]:
    """Return the added tokens, and plain tokens that llama.cpp takes for special ones.

    llama.cpp takes some texts for control tokens however they are typed. Where merges produce such a token, it is plain
    text to the tokenizer; else the writer of the file has mistyped it.
    """
    tokens, types = metadata[f"{_PREFIX}tokens"], _types(metadata)
    special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    merged = {"".join(pair) for pair in _merges(metadata)}
    plain = {"</s>"} if metadata.get(f"{_PREFIX}model") == "gemma4" else set()  # llama.cpp makes an exception
    ends = {metadata.get(f"{_PREFIX}{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    added, colliding = [], []
    for number, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        by_text = kind == TokenType.NORMAL and text in SPECIAL_TEXTS and text not in plain
        if by_text and text in merged:
            colliding.append(text)
        elif kind in special or by_text or (number in ends and len(text) > 1 and text not in merged):
            strips = {side: text in metadata.get(key, ()) for side, key in _STRIPS.items()}
            entry = {"id": number, "content": text, "single_word": False, **strips, "normalized": False}
            added.append(entry | {"special": special.get(TokenType(kind), True)})
    return added, colliding


def _merges(metadata: Metadata) -> list[list[str]]:
    """Return the merges as pairs; a space within a token is written as a letter, so that the first one divides."""
    return [entry.split(" ", 1) for entry in metadata.get(f"{_PREFIX}merges", [])]


def _post_processor(metadata: Metadata, ends: tuple[bool, bool], *, byte_level: bool) -> Json | None:
    """Return the step that adds BOS and EOS."""
    tokens = metadata[f"{_PREFIX}tokens"]
    numbers = [
        metadata.get(f"{_PREFIX}{key}_token_id") if wanted else None
        for key, wanted in zip(("bos", "eos"), ends, strict=True)
    ]
    bos, eos = (
        [] if number is None else [{"SpecialToken": {"id": tokens[number], "type_id": 0}}] for number in numbers
    )
    one, other = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    steps: list[Json] = (
        [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}]
        if byte_level
        else []
    )
    if bos or eos:
        used = [number for number in numbers if number is not None]
        steps.append(
            {
                "type": "TemplateProcessing",
                "single": [*bos, one, *eos],
                "pair": [*bos, one, *eos, *bos, other, *eos],
                "special_tokens": {
                    tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
                    for number in used
                },
            }
        )
    if len(steps) > 1:
        return {"type": "Sequence", "processors": steps}
    return steps[0] if steps else None


def _byte_level(metadata: Metadata) -> tuple[Json, list[str]]:
    """BPE on the letters of bytes."""
    pre = str(metadata.get(f"{_PREFIX}pre", "default"))
    found = pretokenizers.row_named(pre)
    if found is None:
        raise TokenizerError(f"it is not known how llama.cpp's pre-tokenizer {pre!r} splits text", _HINT)
    form, each = metadata.get(keys.NORMALIZER), metadata.get(keys.SPACE) == "each"
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    own = {"ignore_merges": found.ignore_merges, "vocab": _vocab(metadata), "merges": _merges(metadata)}
    return {
        "normalizer": {"type": form} if form else None,
        "pre_tokenizer": pretokenizers.as_tokenizer_json(found.steps, add_prefix_space=each),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe | own,
    }, list(found.limits)


def _by_score(metadata: Metadata) -> tuple[Json, list[str]]:
    """SentencePiece BPE: llama.cpp merges the best-scored token first, so every split of a token is a merge."""
    scores = metadata.get(f"{_PREFIX}scores") or []
    tokens, types = metadata[f"{_PREFIX}tokens"], _types(metadata)
    if len(scores) != len(tokens):
        raise TokenizerError(f"the GGUF file holds {len(tokens)} tokens and {len(scores)} scores", _HINT)
    rows = zip(tokens, scores, types, strict=True)
    merges = sentencepiece_model.merges_of_scores([(text, score, TokenType(kind)) for text, score, kind in rows])
    prefix = metadata.get(f"{_PREFIX}add_space_prefix", True) is not False
    return _on_characters(metadata, merges, prefix=prefix), _SPACE_LIMITS if metadata.get(keys.SPACE) == "spare" else []


_SPACE_LIMITS = ["it has no single space as a text or between two special tokens"]


def _by_rank(metadata: Metadata) -> tuple[Json, list[str]]:
    merges = _merges(metadata)
    crossing = any("\n" in left + right and (left + right).strip("\n") for left, right in merges)
    limits = ["it does not merge a line end with other text"] if crossing else []
    return _on_characters(metadata, merges, prefix=False), limits


def _on_characters(metadata: Metadata, merges: list[list[str]], *, prefix: bool) -> Json:
    """BPE on characters, in which spaces are marks and unknown characters become bytes."""
    tokens, types, space = metadata[f"{_PREFIX}tokens"], _types(metadata), metadata.get(keys.SPACE)
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    begins = [{"type": "Prepend", "prepend": MARK}] if prefix else []
    normalizer: Json | None = {"type": "Sequence", "normalizers": [*begins, _SPACE_TO_MARK]}
    cutter: Json | None = None
    if space in ("spare", "first"):
        scheme = "always" if space == "spare" else "first"
        normalizer, cutter = None, {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": False}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix or cutter else []
    back = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": cutter,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True,
            "byte_fallback": TokenType.BYTE in types, "ignore_merges": False, "vocab": _vocab(metadata),
            "merges": merges,
        },
    }  # fmt: skip


def _unigram(metadata: Metadata) -> tuple[Json, list[str]]:
    """Unigram, with the file's table of replacements."""
    scores, types = metadata.get(f"{_PREFIX}scores") or [], _types(metadata)
    tokens = metadata[f"{_PREFIX}tokens"]
    if len(scores) != len(tokens) or TokenType.UNKNOWN not in types:
        raise TokenizerError("the unigram vocabulary of the GGUF file lacks scores or an unknown token", _HINT)
    table = bytes(value & 255 for value in metadata.get(f"{_PREFIX}precompiled_charsmap", ()))
    steps: list[Json] = []
    if table:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    if metadata.get(f"{_PREFIX}remove_extra_whitespaces"):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if metadata.get(f"{_PREFIX}add_space_prefix", True) else "never"
    marks = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": True}
    splits = metadata.get(keys.SPACE) == "plain"
    cutter = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, marks]} if splits else marks
    limits = (
        ["it replaces combining marks one by one, the tokenizers library whole characters at once"] if table else []
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": cutter,
        "decoder": marks,
        "model": {
            "type": "Unigram",
            "unk_id": types.index(TokenType.UNKNOWN),
            "vocab": [[text, score] for text, score in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
    }, limits


_KINDS: Mapping[str, Callable[[Metadata], tuple[Json, list[str]]]] = {
    "gpt2": _byte_level, "llama": _by_score, "by rank": _by_rank, "t5": _unigram,
}  # fmt: skip
