"""The tokenizer of a model with an adapter: the files beside the adapter over those of the base.

The vocabulary comes from one directory, that of the adapter where it has one. A chat template and special tokens beside
the adapter are those of the training, also where it left the vocabulary out as that of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune_converters.errors import CheckpointError, TokenizerError
from edgetune_converters.files.companions import TEMPLATE_FILE, copy_if_present, write_json
from edgetune_converters.files.contents import read_json
from edgetune_converters.gguf.values import Value, boolean, u32
from edgetune_converters.tokenizers.chat_files import DEFAULT, chat_templates, special_tokens, template_metadata
from edgetune_converters.tokenizers.convert import Vocabulary
from edgetune_converters.tokenizers.special import GGUF_ROLES

_CONFIG, _SPECIAL, _GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
_NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is a vocabulary
_TEMPLATES = (TEMPLATE_FILE, "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"
_ENDS = ("bos_token", "eos_token")  # of which the ids must be known
_HINT = "Put the tokenizer.json of the training beside the adapter"


class TokenizerDirectory:
    """A directory with some files of a tokenizer. Raises TokenizerError for a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config, self.special = (
                read_json(path / name) if (path / name).is_file() else {} for name in (_CONFIG, _SPECIAL)
            )
        except CheckpointError as error:
            raise TokenizerError(error.message, error.hint) from error
        self.templates = chat_templates(path, self.config)
        self.has_vocabulary = any((path / name).is_file() for name in _NEEDED)

    @property
    def tokens(self) -> dict[str, str]:
        """The special tokens that the files name."""
        return special_tokens(self.config, self.special, class_defaults=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing of a tokenizer."""
        return not (self.has_vocabulary or self.config or self.special or self.templates)


def combine(base: Path, adapter: Path, out: Path) -> list[str]:
    """Write the tokenizer files of `base` with those of `adapter` over them to `out`, and return what to note.

    Raises TokenizerError where the adapter's files name an end or a beginning that the base's vocabulary lacks.
    """
    own, theirs = TokenizerDirectory(adapter), TokenizerDirectory(base)
    out.mkdir(parents=True, exist_ok=True)
    first = own if own.has_vocabulary else theirs
    for name in _VOCABULARY:
        copy_if_present(first.path / name, out / name)
    notes: list[str] = []
    config, special = _settings(own, theirs, notes)
    templates = own if own.templates else theirs
    if templates.templates and templates is theirs and own.has_vocabulary:
        notes.append("the tokenizer beside the adapter has no chat template: that of the base is written")
    _write_settings(out, config, special, templates)
    generation = next((d for d in (adapter, base) if (d / _GENERATION).is_file()), base)
    copy_if_present(generation / _GENERATION, out / _GENERATION)
    return notes + template_notes(own.templates, theirs.templates)


def template_notes(own: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return a note where chat templates beside an adapter take the place of other ones of the base."""
    differing = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name)) if own else []
    if not differing or not theirs:
        return []
    if differing == [DEFAULT]:
        return ["the chat template is that beside the adapter, which is not the base's"]
    return [f"the chat templates are those beside the adapter; {', '.join(differing)} differ from the base's"]


def _settings(
    own: TokenizerDirectory, theirs: TokenizerDirectory, notes: list[str]
) -> tuple[TokenizerDirectory | dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json, as the directory that it is copied from or as its content, and special_tokens_map.json."""
    if own.has_vocabulary and own.config:
        return own, own.special
    if not own.config and not own.special:
        return theirs, theirs.special
    unknown = {} if own.has_vocabulary else _unknown_tokens(own, theirs, notes)
    config = {name: value for name, value in own.config.items() if name not in unknown}
    special = {name: value for name, value in own.special.items() if name not in unknown}
    kept = {name: value for name, value in theirs.special.items() if name not in config}
    return {**theirs.config, **config}, {**kept, **special}


def _unknown_tokens(own: TokenizerDirectory, theirs: TokenizerDirectory, notes: list[str]) -> dict[str, str]:
    """Special tokens that only the adapter's files name and that the base's vocabulary lacks."""
    named = {name: text for name, text in own.tokens.items() if theirs.tokens.get(name) != text}
    path = theirs.path / "tokenizer.json"
    if not named or not path.is_file():
        return {}
    decoder = own.config.get("added_tokens_decoder")
    added = {entry.get("content") for entry in decoder.values()} if isinstance(decoder, dict) else set()
    loaded = Tokenizer.from_file(str(path))
    unknown = {name: text for name, text in named.items() if text not in added and loaded.token_to_id(text) is None}
    check_ends(unknown, notes)
    return unknown


def check_ends(unknown: Mapping[str, str], notes: list[str]) -> None:
    """Raise TokenizerError for an end or a beginning that the vocabulary lacks; note other tokens."""
    for name, text in unknown.items():
        sentence = f"the files beside the adapter name the {name} {text!r}, which the tokenizer of the base lacks"
        if name in _ENDS:
            raise TokenizerError(sentence, _HINT)
        notes.append(f"{sentence}; left out")


def _write_settings(
    out: Path, config: TokenizerDirectory | dict[str, Any], special: dict[str, Any], templates: TokenizerDirectory
) -> None:
    """Write tokenizer_config.json, special_tokens_map.json and the templates; unchanged where all are of one place."""
    if special:
        write_json(out / _SPECIAL, special)
    if config is templates:
        copy_if_present(templates.path / _CONFIG, out / _CONFIG)
        for name in _TEMPLATES:
            copy_if_present(templates.path / name, out / name)
        for extra in sorted((templates.path / _MORE_TEMPLATES).glob("*.jinja")):
            (out / _MORE_TEMPLATES).mkdir(exist_ok=True)
            copy_if_present(extra, out / _MORE_TEMPLATES / extra.name)
        return
    stated = dict(config.config if isinstance(config, TokenizerDirectory) else config)
    stated.pop("chat_template", None)
    named = templates.templates
    if named.keys() == {DEFAULT}:
        (out / TEMPLATE_FILE).write_text(named[DEFAULT], encoding="utf-8")
    elif named:
        stated["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    if stated:
        write_json(out / _CONFIG, stated)


def over_vocabulary(vocabulary: Vocabulary, adapter: Path) -> Vocabulary:
    """Return the vocabulary of a GGUF base with the chat templates and special tokens beside an adapter.

    Raises TokenizerError where the adapter's files name an end or a beginning that the vocabulary lacks.
    """
    own = TokenizerDirectory(adapter)
    metadata, notes = dict(vocabulary.metadata), []
    if own.templates:
        theirs = {key: value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")}
        found = template_metadata(own.templates)
        if theirs and {key: value.data for key, value in theirs.items()} != {k: v.data for k, v in found.items()}:
            notes.append("the chat template is that beside the adapter, which is not the base's")
        metadata = {key: value for key, value in metadata.items() if key not in theirs} | found
    metadata |= _special_metadata(own, metadata, notes)
    return replace(vocabulary, metadata=metadata, notes=(*vocabulary.notes, *notes))


def _special_metadata(
    own: TokenizerDirectory, metadata: Mapping[str, Value], notes: list[str]
) -> dict[str, Value]:  # fmt: skip
    """The keys of the special tokens that the adapter's files name."""
    stated = metadata["tokenizer.ggml.tokens"].data
    assert isinstance(stated, list)
    numbers = {text: number for number, text in enumerate(stated)}
    roles = {f"{role}_token": key for key, role in GGUF_ROLES.items()}
    named = {name: text for name, text in own.tokens.items() if name in roles}
    check_ends({name: text for name, text in named.items() if text not in numbers}, notes)
    found: dict[str, Value] = {
        f"tokenizer.ggml.{roles[name]}_token_id": u32(numbers[text]) for name, text in named.items() if text in numbers
    }
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(own.config.get(name), bool):
            found[f"tokenizer.ggml.{name}"] = boolean(own.config[name])
    return found
