"""Byte-level BPE: text is bytes, each byte is mapped to a letter, and merges build the tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from tokenizers import Tokenizer

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import strings
from edgetune_converters.tokenizers import pretokenizers
from edgetune_converters.tokenizers.candidate import Candidate
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.normalization import NormalForm
from edgetune_converters.tokenizers.pretokenizers import PreTokenizer


def candidates(files: TokenizerFiles) -> Iterator[Candidate]:
    """Yield the ways in which llama.cpp may split as this tokenizer does, the likeliest first.

    Raises TokenizerError when no way is known.
    """
    form = _normal_form(files.tokenizer.get("normalizer"))
    notes = [f"the tokenizer normalizes text to {form}, llama.cpp does not"] if form else []
    spaced = pretokenizers.adds_prefix_space(files.tokenizer)
    if spaced:
        notes.append("the tokenizer puts a space before a text, llama.cpp does not")
    metadata = {"tokenizer.ggml.merges": strings([f"{left} {right}" for left, right in merges(files)])}
    for number, found in enumerate(pretokenizers.recognize(files.tokenizer)):
        if found.ignore_merges != bool(files.model.get("ignore_merges")):
            unreachable = _unreachable(files)
            if unreachable is not None and not number:
                raise _ignores_merges(files, found, unreachable)
            if unreachable is not None:
                continue
        yield Candidate("gpt2", found.name, metadata, form, "each" if spaced else "", found.limits, tuple(notes))


def merges(files: TokenizerFiles) -> list[tuple[str, str]]:
    """Return the merges as pairs; older files hold each as one string with a space between."""
    pairs = [entry.split(" ", 1) if isinstance(entry, str) else entry for entry in files.model["merges"]]
    return [(left, right) for left, right in pairs]


def _unreachable(files: TokenizerFiles) -> str | None:
    """A token that the merges do not produce. Without one, `ignore_merges` makes no difference.

    llama.cpp ties `ignore_merges` to the name of the pre-tokenizer.
    """
    model = dict(files.model, ignore_merges=False)
    plain = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model}))
    left_out = files.added.keys() | files.beyond.keys()
    texts = [(text, number) for text, number in model["vocab"].items() if number not in left_out]
    encodings = plain.encode_batch([text for text, _ in texts], add_special_tokens=False)
    pairs = zip(texts, encodings, strict=True)
    return next((text for (text, number), encoding in pairs if encoding.ids != [number]), None)


def _ignores_merges(files: TokenizerFiles, found: PreTokenizer, unreachable: str) -> TokenizerError:
    return TokenizerError(
        f"the merges do not produce the token {unreachable!r}, and llama.cpp's {found.name!r} sets ignore_merges to "
        f"{found.ignore_merges} where the tokenizer in {files.path} has {not found.ignore_merges}"
    )


def _normal_form(normalizer: Any) -> NormalForm:
    """The Unicode normal form, which the runtime applies; any other normalizer of a byte-level BPE is refused."""
    types = [part.get("type") for part in _normalizers(normalizer)]
    forms: list[NormalForm] = [form for form in get_args(NormalForm) if types == ([form] if form else [])]
    if forms:
        return forms[0]
    raise TokenizerError(f"this tokenizer normalizes text in a way that llama.cpp cannot reproduce: {types}")


def _normalizers(normalizer: Any) -> list[Mapping[str, Any]]:
    """The parts of a normalizer, with nested sequences flattened."""
    if not isinstance(normalizer, dict):
        return []
    if normalizer.get("type") != "Sequence":
        return [normalizer]
    return [part for inner in normalizer.get("normalizers", []) for part in _normalizers(inner)]
