"""What the outputs that are directories share: the tokenizer's files in them, and how one takes its place."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import EdgetuneError, TokenizerError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_HINT = "Put the tokenizer's files beside the base"
_HERE = -100  # AT_FDCWD
_RENAME_EXCHANGE = 2  # linux/fs.h
_TEMPLATE_FILE = "chat_template.jinja"


class CompanionFiles(NamedTuple):
    """What stands beside the weights: the base's directory and config, the tokenizer's, and a template in its place."""

    base: Path
    config: Mapping[str, Any]
    tokenizer: Path
    chat_template: str | None
    tied: bool


def check_tokenizer(directory: Path) -> None:
    """Found before the pass: a model without its tokenizer is of no use. Errors: TokenizerError."""
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise TokenizerError(f"{directory} has no tokenizer to go with the merged model", _TOKENIZER_HINT)


def copy_tokenizer(documents: CompanionFiles, folder: Path) -> None:
    """The tokenizer's files as they are, with the template that goes before their own."""
    for name in TOKENIZER_FILES:
        copy(documents.tokenizer / name, folder / name)
    if documents.chat_template is not None:
        (folder / _TEMPLATE_FILE).write_text(documents.chat_template, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A document as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """A file, if it is there."""
    if source.is_file():
        shutil.copyfile(source, target)


def check_replaceable(path: Path, what: str, is_exported: Callable[[Path], bool]) -> None:
    """`what` is to be written to `path`. Errors: EdgetuneError when that is something no export must remove."""
    if path.is_dir() and any(path.iterdir()) and not is_exported(path):
        raise EdgetuneError(
            f"{path} is a directory that was not made by an export: it is not replaced", "Choose another name with -o"
        )
    if path.is_file():
        raise EdgetuneError(f"{path} is a file; {what} is a directory", "Choose another name with -o")


def replace(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a directory that was there before goes.

    Where the system can exchange two names, one of the two directories stands there at every moment. Elsewhere the old
    one has to be put aside first.
    """
    aside = path.with_name(path.name + ".replaced")
    if aside.is_dir():
        shutil.rmtree(aside)
    if path.is_dir() and exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)  # by this name the old one goes now
        return
    if path.is_dir():
        path.rename(aside)
    new.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, with renameat2(2) of Linux. False: the system or the file system cannot."""
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    paths = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    done: int = function(_HERE, paths[0], _HERE, paths[1], _RENAME_EXCHANGE)
    return done == 0
