"""Ids of special tokens, the tokens at which generation stops, and whether encoding adds BOS and EOS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Value, boolean, i32s, u32
from edgetune_converters.tokenizers.beyond import stop_without_row
from edgetune_converters.tokenizers.chat_files import DEFAULT, chat_templates, special_tokens, token_text
from edgetune_converters.tokenizers.end_of_turn import end_of_turn
from edgetune_converters.tokenizers.files import TokenizerFiles, read_tokenizer_files
from edgetune_converters.tokenizers.llama_special_tokens import STOP_TEXTS

# part of the GGUF key -> name in the tokenizer's files
GGUF_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}

_STOP_KEYS = ("eot", "eom")  # places for stop tokens beside EOS


class SpecialTokenIds(NamedTuple):
    """Special tokens of a format that carries the tokenizer's own files.

    `bos` begins a text (None: no token does), generation ends at each of `stops`, `pad` fills up a batch. `notes` say
    what is not certain about them.
    """

    bos: int | None
    stops: tuple[int, ...]
    pad: int | None
    notes: tuple[str, ...] = ()


def special_token_ids(
    directory: Path, model_config: Mapping[str, Any], chat_template: str | None, rows: int
) -> SpecialTokenIds:
    """Read the special tokens of a tokenizer directory, for an embedding of `rows` rows.

    `chat_template` replaces the directory's own. Raises TokenizerError without EOS, or if a stop token has no row.
    """
    files = read_tokenizer_files(directory, model_config, rows)
    found = {role: token_id(files, role, files.loaded.token_to_id) for role in ("bos", "eos", "pad")}
    eos = found["eos"]
    if eos is None:
        raise _no_eos(files)
    own = chat_templates(files.path, files.config)
    template = own.get(DEFAULT) if chat_template is None else chat_template
    stops = stop_ids(files, eos, end_of_turn(files, template))
    return SpecialTokenIds(found["bos"], tuple(stops), found["pad"], tuple(files.notes))


def special_token_metadata(files: TokenizerFiles, tokens: Sequence[str], turn_end: int | None) -> dict[str, Value]:
    """Return the keys of the special token ids. `turn_end` ends an assistant's turn in the chat template.

    Raises TokenizerError without EOS, or if a stop token has no row.
    """
    numbers = {text: number for number, text in enumerate(tokens)}
    found: dict[str, int] = {}
    for key, role in GGUF_ROLES.items():
        number = token_id(files, role, numbers.get)
        if number is not None:
            found[key] = number
    if "eos" not in found:
        raise _no_eos(files)
    further = _further_stops(files, found["eos"], numbers, turn_end)
    found |= dict(zip(_STOP_KEYS, further, strict=False))
    stated = {f"tokenizer.ggml.{key}_token_id": u32(number) for key, number in found.items()}
    carried = further[len(_STOP_KEYS) :]
    return stated | ({keys.STOPS: i32s(carried)} if carried else {})


def _no_eos(files: TokenizerFiles) -> TokenizerError:
    named = special_tokens(files.config, files.special, class_defaults=False)
    text = token_text(named.get("eos_token"))
    if text:
        return TokenizerError(
            f"the tokenizer in {files.path} has no token {text!r}, which its files name as eos_token: generation would "
            "never stop",
            'Set "eos_token" in tokenizer_config.json to a token of the vocabulary',
        )
    return TokenizerError(
        f"the tokenizer in {files.path} names no end-of-sequence token: generation would never stop",
        'Set "eos_token" in tokenizer_config.json',
    )


def token_id(files: TokenizerFiles, role: str, number_of: Callable[[str], int | None]) -> int | None:
    """Return the id of a special token: by its text in the tokenizer's files, else by number in the model's.

    Numbers without a row of the embedding do not count. Raises TokenizerError if they are that of EOS.
    """
    named = special_tokens(files.config, files.special, class_defaults=False)
    for source in (named, files.config, files.special):
        text = token_text(source.get(f"{role}_token"))
        number = None if text is None else number_of(text)
        if role == "eos" and text in files.beyond.values():
            raise stop_without_row(files.path, f"the end-of-sequence token {text!r}", files.rows)
        if number is not None and number not in files.beyond:
            return number
    if role == "unk" and type(files.model.get("unk_id")) is int:
        unknown: int = files.model["unk_id"]
        return unknown
    for numbered in (files.generation, files.model_config):
        number = numbered.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < files.rows:
            return number
        if type(number) is int and role == "eos":
            raise stop_without_row(files.path, f"eos_token_id {number}", files.rows)
    return None


def stop_ids(files: TokenizerFiles, eos: int, turn_end: int | None) -> list[int]:
    """Return every token at which generation stops: EOS, the end of a turn, and those that the model's files list.

    As in transformers, config.json counts only where generation_config.json states none. Raises TokenizerError if the
    end of a turn has no row in the embedding.
    """
    if turn_end in files.beyond:
        ending = f"the token {files.beyond[turn_end]!r}, which ends a turn in the chat template,"
        raise stop_without_row(files.path, ending, files.rows)
    stated = files.generation.get("eos_token_id")
    if stated is None:
        stated = files.model_config.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    valid = [number for number in [eos, turn_end, *listed] if type(number) is int and 0 <= number < files.rows]
    return list(dict.fromkeys(valid))


def _further_stops(files: TokenizerFiles, eos: int, numbers: Mapping[str, int], turn_end: int | None) -> list[int]:
    """Stop tokens beside EOS: the end of a turn first, then those that llama.cpp does not know by their text."""
    known = {numbers[text] for text in STOP_TEXTS if text in numbers}
    found = stop_ids(files, eos, turn_end)[1:]
    return [number for number in found if number == turn_end or number not in known]


def bos_eos_flags(files: TokenizerFiles, metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Return whether encoding adds BOS and EOS.

    Found by encoding a text; tokenizer_config.json takes precedence, as in training. Raises TokenizerError for any
    other token that encoding adds.
    """
    bare, whole = (files.encode(["a"], special=flag)[0] for flag in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    put = {"bos": whole[:at], "eos": whole[at + len(bare) :]}
    named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in put}
    for name, value in named.items():
        if put[name] not in ([], [value.data if value else None]):
            raise TokenizerError(
                f"the tokenizer in {files.path} adds {put['bos']} before and {put['eos']} after a text; "
                "llama.cpp adds only BOS and EOS"
            )
    return {
        f"tokenizer.ggml.add_{name}_token": boolean(_stated(files, name, bool(put[name]), named[name])) for name in put
    }


def _stated(files: TokenizerFiles, name: str, put: bool, token: Value | None) -> bool:
    """Whether tokenizer_config.json has a token added, which may contradict tokenizer.json."""
    stated = files.config.get(f"add_{name}_token")
    if not isinstance(stated, bool) or (stated and token is None):
        return put
    if stated != put:
        files.notes.append(
            f"tokenizer.json {'adds' if put else 'does not add'} {name.upper()} to a text; tokenizer_config.json sets "
            f"add_{name}_token: {str(stated).lower()}, which takes precedence"
        )
    return stated
