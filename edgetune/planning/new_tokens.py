"""The files of a base whose tokenizer gets new tokens: tokenizer.json with them, config.json with the rows for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from edgetune.errors import ConfigError
from edgetune_converters.architectures import completed_config
from edgetune_converters.files.contents import read_json
from edgetune_converters.merging.resized_vocabulary import with_rows

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
"""Ends of the names of weight files."""
_TOKENIZER, _CONFIG, _STATED = "tokenizer.json", "config.json", "tokenizer_config.json"
# a list of added tokens beside tokenizer.json, which need not be complete there
_LISTS = ("added_tokens.json",)


def write_with_tokens(base: Path, folder: Path, new: Sequence[str], special: Sequence[str]) -> None:
    """Write the files of a base without its weights to `folder`, with new tokens behind the present ones.

    Args:
        base: A model directory.
        folder: An empty directory.
        new: Texts of the new tokens.
        special: Texts of the new special tokens.

    Raises:
        ConfigError: A new token is a token of the base already, or it has no tokenizer.json.
    """
    if not (base / _TOKENIZER).is_file():
        raise ConfigError(f"adapter.new_tokens: the base in {base} has no {_TOKENIZER}", "Use a base that has one")
    for path in base.iterdir():
        if path.name.endswith((*WEIGHTS, ".index.json")) or path.name in (_TOKENIZER, _CONFIG, *_LISTS):
            continue
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    tokenizer = Tokenizer.from_file(str(base / _TOKENIZER))
    known = [token for token in (*new, *special) if tokenizer.token_to_id(token) is not None]
    if known:
        raise ConfigError(
            f"adapter.new_tokens: {', '.join(map(repr, known))} {'is a token' if len(known) == 1 else 'are tokens'} of "
            "the base already",
            "Name it in adapter.tokens, which trains its row",
        )
    added = [(token, AddedToken(token, normalized=False, special=token in special)) for token in (*new, *special)]
    tokenizer.add_tokens([entry for token, entry in added if token in new])
    tokenizer.add_special_tokens([entry for token, entry in added if token in special])
    tokenizer.save(str(folder / _TOKENIZER))
    ids = {token: int(tokenizer.token_to_id(token) or 0) for token, _ in added}
    _list_tokens(folder / _STATED, {str(ids[token]): _described(entry) for token, entry in added})
    stated = read_json(base / _CONFIG)
    rows = max(completed_config(stated).vocab_size, 1 + max(ids.values()))
    (folder / _CONFIG).write_text(json.dumps(with_rows(stated, rows), indent=2) + "\n", encoding="utf-8")


def _list_tokens(file: Path, described: dict[str, dict[str, object]]) -> None:
    """Add the tokens to those that tokenizer_config.json lists, if it lists any."""
    stated = read_json(file) if file.is_file() else {}
    listed = stated.get("added_tokens_decoder")
    if isinstance(listed, dict):
        stated["added_tokens_decoder"] = {**listed, **described}
        file.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _described(token: AddedToken) -> dict[str, object]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}
