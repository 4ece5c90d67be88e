"""The files that accompany the weights in a model directory: the tokenizer's, the chat template, JSON documents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", TEMPLATE_FILE,
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


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


def check_tokenizer(directory: Path) -> None:
    """Check before the pass that there is a tokenizer to copy. Raises TokenizerError."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise TokenizerError(
            f"{directory} has no tokenizer to go with the merged model", "Put the tokenizer's files beside the base"
        )


def copy_tokenizer(companions: CompanionFiles, directory: Path) -> None:
    """Copy the tokenizer's files unchanged; write the chat template that replaces its own."""
    for name in TOKENIZER_FILES:
        copy_if_present(companions.tokenizer / name, directory / name)
    if companions.chat_template is not None:
        (directory / TEMPLATE_FILE).write_text(companions.chat_template, encoding="utf-8")


def copy_if_present(source: Path, target: Path) -> None:
    """Copy a file, if it exists."""
    if source.is_file():
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
