"""A Hugging Face tokenizer as the vocabulary of a GGUF file.

tokenizer.json is the truth: it is what the model was trained with. What llama.cpp cannot reproduce token for token is
an error here, not a surprise later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune_converters import pretokenizers
from edgetune_converters.checkpoint import read_json
from edgetune_converters.errors import CheckpointError, TokenizerError
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Value, boolean, f32s, i32s, string, strings, u32

_MARK = "\u2581"  # SentencePiece's visible space
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class TokenType(IntEnum):
    """What llama.cpp does with a token, numbered as in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A converted tokenizer. `metadata` holds all `tokenizer.*` keys; `size` counts tokens with padding rows."""

    model: str
    pre: str
    size: int
    metadata: dict[str, Value]
    notes: tuple[str, ...] = ()


@dataclass
class _Files:
    """The JSON files of a tokenizer directory; absent ones are empty."""

    path: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special: dict[str, Any]
    generation: Mapping[str, Any]
    model_config: Mapping[str, Any]
    loaded: Tokenizer
    notes: list[str] = field(default_factory=list)


def convert(
    directory: Path, rows: int, model_config: Mapping[str, Any], *, chat_template: str | None = None
) -> Vocabulary:
    """Convert the tokenizer of `directory` for an embedding of `rows` rows.

    `model_config` is the model's config.json, asked for special token ids that the tokenizer does not name.
    `chat_template` replaces the directory's own. Errors: TokenizerError.
    """
    files = _read(directory, model_config)
    tokens, types = _tokens(files, rows)
    ids = {text: number for number, text in enumerate(tokens)}
    model, pre, specific = _model(files, tokens, types)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": string(model),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": i32s(types),
        **specific,
        **_special_ids(files, ids, rows),
        **_templates(files, chat_template),
    }
    metadata |= _added_at_the_ends(files, metadata)
    return Vocabulary(model, pre, rows, metadata, tuple(files.notes))


def _read(directory: Path, model_config: Mapping[str, Any]) -> _Files:
    if not (directory / "tokenizer.json").is_file():
        hint = "save it as a fast tokenizer: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        raise TokenizerError(f"{directory} has no tokenizer.json", hint)
    try:
        loaded = [read_json(directory / name) if (directory / name).is_file() else {} for name in _FILES]
    except CheckpointError as error:
        raise TokenizerError(error.message, error.hint) from error
    tokenizer, config, special, generation = loaded
    _check_kind(directory, tokenizer.get("model"))
    return _Files(directory, tokenizer, config, special, generation, model_config, _load(directory, tokenizer))


def _check_kind(directory: Path, model: Any) -> None:
    if not isinstance(model, dict):
        raise TokenizerError(f"{directory / 'tokenizer.json'} has no model")
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"the tokenizer in {directory} is of the kind {model['type']}; BPE is supported")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"the tokenizer in {directory} uses {name}, which llama.cpp does not know")


def _load(directory: Path, tokenizer: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer itself, which also proves that tokenizer.json has the structure that is relied on below."""
    try:
        return Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{directory / 'tokenizer.json'} is not valid: {error}") from error


# -- tokens and their types --------------------------------------------------------------------------------------------


def _added(files: _Files) -> dict[int, dict[str, Any]]:
    """Added tokens by id, from tokenizer.json and, for older directories, from tokenizer_config.json."""
    added: dict[int, dict[str, Any]] = {}
    decoder = files.config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not number.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(
                f"{files.path / 'tokenizer_config.json'}: added_tokens_decoder[{number!r}] is no token"
            )
        added[int(number)] = entry
    added |= {entry["id"]: entry for entry in files.tokenizer.get("added_tokens") or []}
    return added


def _tokens(files: _Files, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are padding and typed UNUSED."""
    vocab = files.tokenizer["model"]["vocab"]
    added = _added(files)
    texts = {number: text for text, number in vocab.items()}
    texts |= {number: entry["content"] for number, entry in added.items()}
    largest = max(texts, default=-1)
    if largest >= rows:
        raise TokenizerError(
            f"the tokenizer has {largest + 1} tokens, the model only {rows} rows of embeddings",
            "Give the tokenizer that belongs to this model, or resize the model's embeddings",
        )
    unknown = files.tokenizer["model"].get("unk_token")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(texts.get(number), added.get(number), unknown, files) for number in range(rows)]
    _check_distinct(tokens)
    return tokens, [int(kind) for kind in types]


def _type(text: str | None, added: Mapping[str, Any] | None, unknown: str | None, files: _Files) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    byte_fallback = bool(files.tokenizer["model"].get("byte_fallback"))
    if byte_fallback and text == unknown:
        return TokenType.UNKNOWN
    if byte_fallback and _byte_value(text) is not None:
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    _note_stripping(text, added, files)
    return TokenType.CONTROL if added.get("special") or _looks_special(text) else TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """<|...|> and its full-width twin are control tokens to llama.cpp even where the tokenizer does not say so."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def _note_stripping(text: str, added: Mapping[str, Any], files: _Files) -> None:
    sides = [side for side in ("lstrip", "rstrip", "single_word") if added.get(side)]
    if sides:
        files.notes.append(f"the token {text!r} is {' and '.join(sides)}, which llama.cpp does not do")


def _byte_value(text: str) -> int | None:
    """The byte of a token such as <0x0A>."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _check_distinct(tokens: Sequence[str]) -> None:
    """llama.cpp aborts the process when two tokens have the same text."""
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        if text in seen:
            raise TokenizerError(f"the tokens {seen[text]} and {number} are both {text!r}, which GGUF cannot hold")
        seen[text] = number


# -- the two kinds of model --------------------------------------------------------------------------------------------


def _model(files: _Files, tokens: list[str], types: list[int]) -> tuple[str, str, dict[str, Value]]:
    merges = _merges(files)
    if files.tokenizer["model"].get("byte_fallback"):
        return _sentencepiece(files, merges, tokens, types)
    return _byte_level(files, merges)


def _merges(files: _Files) -> list[tuple[str, str]]:
    """Merges as pairs; older files hold them as one string with a space between."""
    found = files.tokenizer["model"]["merges"]
    pairs = [entry.split(" ", 1) if isinstance(entry, str) else entry for entry in found]
    return [(left, right) for left, right in pairs]


def _byte_level(files: _Files, merges: list[tuple[str, str]]) -> tuple[str, str, dict[str, Value]]:
    specific = {"tokenizer.ggml.merges": strings([f"{left} {right}" for left, right in merges])}
    found = pretokenizers.recognise(files.tokenizer)
    if found.ignore_merges != bool(files.tokenizer["model"].get("ignore_merges")):
        _check_merges_suffice(files, found)
    if found.normalizer:
        # llama.cpp does not normalize; edgetune's own runtime reads this key and does
        specific[keys.NORMALIZER] = string(found.normalizer)
        files.notes.append(f"the tokenizer normalizes text to {found.normalizer}, llama.cpp does not")
    return "gpt2", found.name, specific


def _check_merges_suffice(files: _Files, found: pretokenizers.PreTokenizer) -> None:
    """`ignore_merges` is tied to the pre-tokenizer's name in llama.cpp: it must make no difference here."""
    model = dict(files.tokenizer["model"], ignore_merges=False)
    plain = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model}))
    added = _added(files)
    for text, number in model["vocab"].items():
        if number not in added and plain.encode(text, add_special_tokens=False).ids != [number]:
            raise TokenizerError(
                f"the merges do not produce the token {text!r}, and llama.cpp's {found.name!r} sets ignore_merges to "
                f"{found.ignore_merges} where this tokenizer has {not found.ignore_merges}"
            )


def _sentencepiece(
    files: _Files, merges: list[tuple[str, str]], tokens: list[str], types: list[int]
) -> tuple[str, str, dict[str, Value]]:
    missing = 256 - sum(kind == TokenType.BYTE for kind in types)
    if missing:
        raise TokenizerError(f"the tokenizer in {files.path} has byte_fallback but lacks {missing} of 256 byte tokens")
    prefix = pretokenizers.space_prefix(files.tokenizer)
    if prefix.note:
        files.notes.append(prefix.note)
    tokens[:] = [
        text.replace(_MARK, " ") if kind == TokenType.USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    scores = _scores(files, merges, tokens, types)
    return (
        "llama",
        "default",
        {
            "tokenizer.ggml.scores": f32s(scores),
            "tokenizer.ggml.add_space_prefix": boolean(prefix.added),
        },
    )


def _scores(files: _Files, merges: list[tuple[str, str]], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """A score for each token such that merging by score, as llama.cpp does, is merging by rank, as tokenizer.json does.

    llama.cpp merges any two neighbours whose concatenation is a token, the best token first. That is the same only if
    every way of splitting a token is among its merges and no token's merges are interleaved with another's.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    pairs = set(merges)
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for text in sorted(normal):
        for cut in range(1, len(text)):
            split = (text[:cut], text[cut:])
            if split not in pairs and split[0] in normal and split[1] in normal:
                raise _not_by_score(files, f"{split[0]!r} and {split[1]!r} may not be merged into {text!r}")
    previous = -1
    for text, found in sorted(ranks.items(), key=lambda item: item[1][0]):
        if found[0] < previous:
            raise _not_by_score(files, f"the merges into {text!r} are interleaved with those of another token")
        previous = found[-1]
    worst = -float(len(merges) + 1)
    return [-float(ranks[text][0]) if text in ranks else worst for text in tokens]


def _not_by_score(files: _Files, why: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer in {files.path} cannot be written as SentencePiece scores: {why}",
        "A byte-level BPE tokenizer has no such limit",
    )


# -- special tokens ----------------------------------------------------------------------------------------------------

# GGUF key -> name in the tokenizer's files
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
# llama.cpp ends generation at these texts by itself
_KNOWN_STOPS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
)  # fmt: skip


def _special_ids(files: _Files, ids: Mapping[str, int], rows: int) -> dict[str, Value]:
    found: dict[str, int] = {}
    for key, role in _ROLES.items():
        number = _special_id(files, role, ids)
        if number is not None and not 0 <= number < rows:
            raise TokenizerError(f"{role}_token_id is {number}, the vocabulary has {rows} tokens")
        if number is not None:
            found[key] = number
    if "eos" not in found:
        raise TokenizerError(
            f"the tokenizer in {files.path} names no end-of-sequence token: generation would never stop",
            'Set "eos_token" in tokenizer_config.json',
        )
    extra = _further_stops(files, found["eos"], ids)
    found |= dict(zip(("eot", "eom"), extra, strict=False))
    if len(extra) > 2:
        files.notes.append(f"the stop tokens {extra[2:]} have no place in GGUF")
    return {f"tokenizer.ggml.{key}_token_id": u32(number) for key, number in found.items()}


def _special_id(files: _Files, role: str, ids: Mapping[str, int]) -> int | None:
    """From the tokenizer's files by text, else from the model's by number."""
    for source in (files.config, files.special):
        named = source.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and text in ids:
            return ids[text]
    for numbered in (files.generation, files.model_config):
        number = numbered.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int:
            return number
    return None


def _further_stops(files: _Files, eos: int, ids: Mapping[str, int]) -> list[int]:
    """Stop tokens of generation_config.json that llama.cpp would not know."""
    stops = files.generation.get("eos_token_id")
    known = {ids[text] for text in _KNOWN_STOPS if text in ids} | {eos}
    listed = stops if isinstance(stops, list) else [stops]
    return [number for number in listed if type(number) is int and number not in known and number < len(ids)]


def _added_at_the_ends(files: _Files, metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Whether encoding adds BOS and EOS, found out by encoding. Anything else at the ends cannot be carried."""
    bare, whole = (files.loaded.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if before not in ([], [bos.data if bos else None]) or after not in ([], [eos.data if eos else None]):
        raise TokenizerError(
            f"the tokenizer in {files.path} puts {before} before and {after} after a text; "
            "only BOS and EOS can be carried"
        )
    flags = {"bos": bool(before), "eos": bool(after)}
    if files.tokenizer.get("post_processor") is None:
        flags |= {name: bool(files.config.get(f"add_{name}_token", False)) for name in flags}
    return {f"tokenizer.ggml.add_{name}_token": boolean(flag) for name, flag in flags.items()}


# -- chat templates ----------------------------------------------------------------------------------------------------


def _templates(files: _Files, override: str | None) -> dict[str, Value]:
    """The default chat template and named ones; chat_template.jinja goes before tokenizer_config.json."""
    named = _configured_templates(files.config.get("chat_template"))
    single = files.path / "chat_template.jinja"
    if single.is_file():
        named["default"] = _template_file(single)
    for extra in sorted((files.path / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = _template_file(extra)
    if override is not None:
        named["default"] = override
    default = named.pop("default", None)
    metadata = {} if default is None else {"tokenizer.chat_template": string(default)}
    metadata |= {f"tokenizer.chat_template.{name}": string(text) for name, text in sorted(named.items())}
    if named:
        metadata["tokenizer.chat_templates"] = strings(sorted(named))
    return metadata


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read the chat template {path}: {error}") from error


def _configured_templates(stated: Any) -> dict[str, str]:
    """A template as text, or several as a list of {name, template}."""
    if isinstance(stated, str):
        return {"default": stated}
    entries = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
