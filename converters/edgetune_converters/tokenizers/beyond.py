"""Tokens whose ids lie past the last row of the embedding, such as the placeholder for images of a text-only Gemma 3.

No text of a language model may hold one. llama.cpp's converter leaves them out of the vocabulary, and so do we.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError

_HINT = "Give the tokenizer that belongs to this model, or resize the model's embeddings"
_SHOWN = 3


def tokens_beyond(
    directory: Path, model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int
) -> dict[int, str]:
    """Return the tokens past the last of `rows` rows by id.

    Args:
        directory: Where the tokenizer is, for messages.
        model: The `model` object of tokenizer.json.
        added: Its added tokens by id.
        rows: The number of rows of the embedding.

    Raises:
        TokenizerError: Text can be tokenized into such tokens of the model's own vocabulary: it belongs to another
            model.
    """
    own = {number: text for number, text in _numbered(model["vocab"]) if number >= rows}
    foreign = [text for number, text in own.items() if number not in added]
    found = own | {number: entry["content"] for number, entry in added.items() if number >= rows}
    if foreign and _some_reachable(model, foreign):
        raise TokenizerError(
            f"the tokenizer in {directory} has {max(found) + 1} tokens, the model only {rows} rows of embeddings", _HINT
        )
    return dict(sorted(found.items()))


def without_tokens_beyond(tokenizer: Mapping[str, Any], beyond: Mapping[int, str]) -> dict[str, Any]:
    """Return tokenizer.json without these tokens."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = [entry for number, entry in enumerate(vocabulary) if number not in beyond]
    else:
        vocabulary = {text: number for text, number in vocabulary.items() if number not in beyond}
    added = [entry for entry in tokenizer.get("added_tokens") or [] if entry["id"] not in beyond]
    return {**tokenizer, "added_tokens": added, "model": {**tokenizer["model"], "vocab": vocabulary}}


def check_not_put_around(directory: Path, beyond: Mapping[int, str], put: Collection[int]) -> None:
    """Raise TokenizerError if one of these tokens is among those that the tokenizer puts around every text."""
    for number in beyond.keys() & put:
        raise TokenizerError(
            f"the tokenizer in {directory} adds {beyond[number]!r} ({number}) to every text, and the embedding has no "
            "row for it",
            _HINT,
        )


def stop_without_row(directory: Path, what: str, rows: int) -> TokenizerError:
    """Return the error for a stop token without a row."""
    return TokenizerError(
        f"{what} of the tokenizer in {directory} has no row in the embedding, which has {rows}: the model could never "
        "stop",
        _HINT,
    )


def named(beyond: Mapping[int, str]) -> str:
    """Return `the token '<image>' (503)`, or the first of several."""
    shown = ", ".join(f"{text!r} ({number})" for number, text in list(beyond.items())[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    return f"the token{'s' if len(beyond) > 1 else ''} {shown}{more}"


def _numbered(vocabulary: Any) -> Iterator[tuple[int, str]]:
    if isinstance(vocabulary, list):
        return enumerate(text for text, _ in vocabulary)
    return ((number, text) for text, number in vocabulary.items())


def _some_reachable(model: Mapping[str, Any], texts: Collection[str]) -> bool:
    """Whether text is tokenized into one of these tokens: by merges, as a single character or as a byte."""
    if model.get("type") == "Unigram" or model.get("ignore_merges"):
        return True
    merged = {"".join(entry.split(" ", 1) if isinstance(entry, str) else entry) for entry in model["merges"]}
    return any(len(text) == 1 or text in merged or text.startswith("<0x") for text in texts)
