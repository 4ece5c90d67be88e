"""The files of a tokenizer directory, read once and checked for the structure that the conversion relies on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edgetune_converters.errors import CheckpointError, TokenizerError
from edgetune_converters.files.contents import read_json
from edgetune_converters.tokenizers import sentencepiece_model
from edgetune_converters.tokenizers.beyond import check_not_put_around, named, tokens_beyond

_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_KINDS = ("BPE", "Unigram")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass
class TokenizerFiles:
    """The JSON files of a tokenizer directory; absent ones are empty. `loaded` is the tokenizer itself.

    `notes` collect what the conversion reports.
    """

    path: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special: dict[str, Any]
    generation: Mapping[str, Any]
    model_config: Mapping[str, Any]
    loaded: Tokenizer
    added: dict[int, dict[str, Any]]
    """Added tokens by id, as tokenizer.json writes them."""
    rows: int
    """The number of rows of the embedding."""
    beyond: dict[int, str] = field(default_factory=dict)
    """Tokens past the last row, by id."""
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Any]:
        """The `model` object of tokenizer.json."""
        found: dict[str, Any] = self.tokenizer["model"]
        return found

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Return the tokenizer's own ids; `special` also adds BOS and EOS. Raises TokenizerError."""
        with _library_errors(self.path):
            return [each.ids for each in self.loaded.encode_batch(list(texts), add_special_tokens=special)]


def read_tokenizer_files(directory: Path, model_config: Mapping[str, Any], rows: int) -> TokenizerFiles:
    """Read a tokenizer directory, for an embedding of `rows` rows.

    Added tokens past the last row are left out of `added`, with a note.

    Raises:
        TokenizerError: For a damaged or unknown tokenizer, or if text can be tokenized into other tokens past the last
            row: it belongs to another model.
    """
    try:
        config, special, generation = (_optional(directory / name) for name in _NAMES)
        tokenizer = _tokenizer(directory, config)
    except CheckpointError as error:
        raise TokenizerError(error.message, error.hint) from error
    _check_kind(directory, tokenizer.get("model"))
    loaded = _load(directory, tokenizer)
    added = _added(directory, tokenizer, config)
    _add_missing(loaded, added, directory)
    files = TokenizerFiles(directory, tokenizer, config, special, generation, model_config, loaded, added, rows)
    files.beyond = tokens_beyond(directory, files.model, added, rows)
    if files.beyond:
        files.notes.append(f"the embedding has {rows} rows, none for {named(files.beyond)}: left out")
        files.added = {number: entry for number, entry in added.items() if number < rows}
        check_not_put_around(directory, files.beyond, files.encode(["a"], special=True)[0])
    return files


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tokenizer(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json, or its equivalent made of the SentencePiece model."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    for name in sentencepiece_model.FILES:
        if (directory / name).is_file():
            return sentencepiece_model.as_tokenizer_json(directory / name, config)
    hint = "save it as a fast tokenizer: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    raise TokenizerError(f"{directory} has no tokenizer.json", hint)


def _check_kind(directory: Path, model: Any) -> None:
    if not isinstance(model, dict):
        raise TokenizerError(f"{directory / 'tokenizer.json'} has no model")
    if model.get("type", "BPE") not in _KINDS:
        raise TokenizerError(
            f"the tokenizer in {directory} is of the kind {model['type']}; {' and '.join(_KINDS)} are supported"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"the tokenizer in {directory} uses {name}, which llama.cpp does not support")


@contextmanager
def _library_errors(directory: Path) -> Iterator[None]:
    """The tokenizers library raises bare Exception; a panic in it is not even an Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{directory / 'tokenizer.json'} is not valid: {error}") from error
        raise


def _load(directory: Path, tokenizer: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer. This also checks the structure of tokenizer.json that the code below relies on."""
    path = directory / "tokenizer.json"
    with _library_errors(directory):
        loaded = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_str(json.dumps(tokenizer))
        loaded.no_truncation()
        loaded.no_padding()
    return loaded


def _added(directory: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens by id, from tokenizer.json and, for older directories, from tokenizer_config.json."""
    added: dict[int, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not number.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder[{number!r}] is no token")
        added[int(number)] = entry
    return added | {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}


def _add_missing(loaded: Tokenizer, added: Mapping[int, Mapping[str, Any]], directory: Path) -> None:
    """Add tokens that only tokenizer_config.json lists, as transformers does.

    The library gives an added token the next free id, whatever the file states; the two must agree.
    """
    for number, entry in sorted(added.items()):
        content = entry["content"]
        if content and loaded.token_to_id(content) is None:
            loaded.add_tokens([AddedToken(content, **{flag: bool(entry.get(flag)) for flag in _FLAGS})])
        if content and loaded.token_to_id(content) != number:
            raise TokenizerError(
                f"the files in {directory} give the token {content!r} the id {number}, but it is loaded as "
                f"{loaded.token_to_id(content)}",
                "Save the tokenizer again with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
