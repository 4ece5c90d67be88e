"""The files that accompany the weights in a model directory: the tokenizer's, the chat template, JSON documents."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError
from edgetune_converters.files.contents import read_json

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", TEMPLATE_FILE,
)  # fmt: skip
_FAST_TOKENIZER = "tokenizer.json"
_KEY = re.compile(r'[\s,]*"')
_COLON = re.compile(r"\s*:\s*")
_VOCABULARIES = (_FAST_TOKENIZER, "tokenizer.model", "vocab.json")


class CompanionFiles(NamedTuple):
    """Sources of the files beside the weights."""

    base: Path
    """The directory of the base."""
    config: Mapping[str, Any]
    """config.json of the base."""
    tokenizer: Path
    """The directory of the tokenizer's files."""
    chat_template: str | None
    """Replaces the tokenizer's own template."""
    tied: bool
    """Whether the embedding is also the output matrix."""
    templates: Mapping[str, bytes] = MappingProxyType({})
    """Files of chat templates: path in the directory -> content. They replace those of the tokenizer."""
    notes: tuple[str, ...] = ()
    """Remarks on files that were rebuilt from a GGUF file."""
    pad_token: str | None = None
    """Replaces the padding token in tokenizer_config.json."""


def check_tokenizer(directory: Path) -> None:
    """Check before the pass that there is a tokenizer to copy. Raises TokenizerError."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise TokenizerError(
            f"{directory} has no tokenizer to go with the merged model", "Put the tokenizer's files beside the base"
        )


def copy_tokenizer(companions: CompanionFiles, directory: Path) -> None:
    """Copy the tokenizer's files; write the chat template that replaces its own.

    They are unchanged, except that tokenizer.json neither truncates nor pads.
    """
    for name in TOKENIZER_FILES:
        content = tokenizer_file(companions.tokenizer, name)
        if content is not None:
            (directory / name).write_bytes(content)
    for name, content in companions.templates.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    if companions.pad_token is not None:
        _set_pad_token(directory, companions.pad_token)


def _set_pad_token(directory: Path, token: str) -> None:
    """Name the padding token in a copied tokenizer, where it names another one or none."""
    for name in (_TOKENIZER_CONFIG, "special_tokens_map.json"):
        path = directory / name
        stated = read_json(path) if path.is_file() else {}
        found = stated.get("pad_token")
        before = found.get("content") if isinstance(found, Mapping) else found
        if before != token and (found is not None or name == _TOKENIZER_CONFIG):
            write_json(path, {**stated, "pad_token": token})


def tokenizer_file(directory: Path, name: str) -> bytes | None:
    """Return the content of a tokenizer's file as it is copied; None if there is no such file."""
    path = directory / name
    if not path.is_file():
        return None
    content = path.read_bytes()
    return without_limits(content) if name == _FAST_TOKENIZER else content


def without_limits(content: bytes) -> bytes:
    """Return tokenizer.json with null for truncation and padding, and every other byte unchanged."""
    text = content.decode("utf-8", "surrogateescape")
    for first, end in sorted(_limit_spans(text).values(), reverse=True):
        text = f"{text[:first]}null{text[end:]}"
    return text.encode("utf-8", "surrogateescape")


def tokenizer_notes(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Return what copies of a tokenizer do not keep, and a limit that they keep; `config` is config.json."""
    path = directory / _FAST_TOKENIZER
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    found = {key: json.loads(text[slice(*span)]) for key, span in _limit_spans(text).items()}
    does = [_LIMITS[key](value) for key, value in sorted(found.items(), reverse=True)]
    notes = [f"{path.name} {' and '.join(does)}: left out of the copy, so that texts stay whole"] if does else []
    stated = directory / _TOKENIZER_CONFIG
    limit = read_json(stated).get("model_max_length") if stated.is_file() else None
    inner = config.get("text_config")
    context = {**(inner if isinstance(inner, dict) else {}), **config}.get("max_position_embeddings")
    if isinstance(limit, (int, float)) and isinstance(context, int) and 0 < limit < context:
        notes.append(
            f"{stated.name} states model_max_length {limit:g}, the model's context is {context}: transformers warns of "
            "longer texts"
        )
    return notes


def _truncates(truncation: Any) -> str:
    most = truncation.get("max_length") if isinstance(truncation, dict) else None
    return f"truncates texts to {most} tokens"


def _pads(padding: Any) -> str:
    strategy = padding.get("strategy") if isinstance(padding, dict) else None
    return f"pads texts to {strategy['Fixed']} tokens" if isinstance(strategy, dict) and strategy else "pads texts"


_LIMITS: Mapping[str, Callable[[Any], str]] = {"truncation": _truncates, "padding": _pads}


def _limit_spans(text: str) -> dict[str, tuple[int, int]]:
    """Return where the values of truncation and padding stand in a tokenizer.json, unless they are null."""
    decode = json.JSONDecoder().raw_decode
    spans: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    try:
        at = text.index("{") + 1
        while match := _KEY.match(text, at):
            name, at = decode(text, match.end() - 1)
            at = _COLON.match(text, at).end()  # type: ignore[union-attr]
            value, end = decode(text, at)
            if name in _LIMITS and value is not None:
                spans[name] = (at, end)
            seen.add(name)
            if seen >= _LIMITS.keys():  # the vocabulary follows, which is large
                break
            at = end
    except (ValueError, AttributeError):  # not JSON: whoever reads it will say so
        return {}
    return spans


def copy_if_present(source: Path, target: Path) -> None:
    """Copy a file, if it exists."""
    if source.is_file():
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
