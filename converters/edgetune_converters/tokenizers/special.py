"""Ids of special tokens, the tokens at which generation stops, and what is put before and after a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, boolean, u32
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.llama_special_tokens import STOP_TEXTS

# GGUF key -> name in the tokenizer's files
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}


def special_token_metadata(files: TokenizerFiles, tokens: Sequence[str], turn_end: int | None) -> dict[str, Value]:
    """The special token ids of the file. `turn_end` ends an assistant's turn in the chat template.

    Errors: TokenizerError.
    """
    numbers = {text: number for number, text in enumerate(tokens)}
    found: dict[str, int] = {}
    for key, role in _ROLES.items():
        number = token_id(files, role, numbers.get)
        if number is not None and not 0 <= number < len(tokens):
            raise TokenizerError(f"{role}_token_id is {number}, the vocabulary has {len(tokens)} tokens")
        if number is not None:
            found[key] = number
    if "eos" not in found:
        raise TokenizerError(
            f"the tokenizer in {files.path} names no end-of-sequence token: generation would never stop",
            'Set "eos_token" in tokenizer_config.json',
        )
    found |= dict(zip(("eot", "eom"), _further_stops(files, found["eos"], numbers, turn_end), strict=False))
    return {f"tokenizer.ggml.{key}_token_id": u32(number) for key, number in found.items()}


def token_id(files: TokenizerFiles, role: str, number_of: Callable[[str], int | None]) -> int | None:
    """From the tokenizer's files by text, else from the model's by number."""
    for source in (files.config, files.special):
        named = source.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        number = number_of(text) if isinstance(text, str) else None
        if number is not None:
            return number
    if role == "unk" and type(files.model.get("unk_id")) is int:
        unknown: int = files.model["unk_id"]
        return unknown
    for numbered in (files.generation, files.model_config):
        number = numbered.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int:
            return number
    return None


def stop_ids(files: TokenizerFiles, eos: int, rows: int, turn_end: int | None) -> list[int]:
    """Every token at which generation is to stop: eos, those of generation_config.json, the end of a turn."""
    stated = files.generation.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    valid = [number for number in [eos, turn_end, *listed] if type(number) is int and 0 <= number < rows]
    return list(dict.fromkeys(valid))


def _further_stops(files: TokenizerFiles, eos: int, numbers: Mapping[str, int], turn_end: int | None) -> list[int]:
    """Stop tokens beside eos; the end of a turn first, then those that llama.cpp would not know by their text."""
    known = {numbers[text] for text in STOP_TEXTS if text in numbers}
    found = stop_ids(files, eos, len(numbers), turn_end)[1:]
    return [number for number in found if number == turn_end or number not in known]


def bos_eos_flags(files: TokenizerFiles, metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Whether encoding adds BOS and EOS.

    Found out by encoding; tokenizer_config.json has the last word, as it has in training. Anything else at the ends
    cannot be carried. Errors: TokenizerError.
    """
    bare, whole = (files.encode(["a"], special=flag)[0] for flag in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    put = {"bos": whole[:at], "eos": whole[at + len(bare) :]}
    named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in put}
    for name, value in named.items():
        if put[name] not in ([], [value.data if value else None]):
            raise TokenizerError(
                f"the tokenizer in {files.path} puts {put['bos']} before and {put['eos']} after a text; "
                "only BOS and EOS can be carried"
            )
    return {
        f"tokenizer.ggml.add_{name}_token": boolean(_stated(files, name, bool(put[name]), named[name])) for name in put
    }


def _stated(files: TokenizerFiles, name: str, put: bool, token: Value | None) -> bool:
    """What tokenizer_config.json says about adding a token, which may contradict tokenizer.json."""
    stated = files.config.get(f"add_{name}_token")
    if not isinstance(stated, bool) or (stated and token is None):
        return put
    if stated != put:
        files.notes.append(
            f"tokenizer.json {'puts' if put else 'does not put'} {name.upper()} at a text, tokenizer_config.json says "
            f"add_{name}_token: {str(stated).lower()}, which is followed"
        )
    return stated
