"""The files of a base with the tokenizer of another directory, such as that beside an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgetune.errors import ConfigError
from edgetune.planning.new_tokens import WEIGHTS
from edgetune_converters.files.companions import TOKENIZER_FILES
from edgetune_converters.tokenizers.beside_adapter import TokenizerDirectory, combine

_ALSO = ("chat_template.json", "additional_chat_templates", "generation_config.json")


def write_with_tokenizer(base: Path, tokenizer: Path, folder: Path) -> list[str]:
    """Write the files of a base without its weights to `folder`, with the tokenizer files of another directory.

    Args:
        base: A model directory.
        tokenizer: A directory with some files of a tokenizer; those that it lacks are the base's.
        folder: An empty directory.

    Returns:
        Notes on what differs from the base.

    Raises:
        ConfigError: There is nothing of a tokenizer.
        TokenizerError: The files of both do not fit together.
    """
    if not tokenizer.is_dir() or TokenizerDirectory(tokenizer).is_empty:
        raise ConfigError(
            f"tokenizer: {tokenizer} has no file of a tokenizer",
            "Give a directory with tokenizer.json, tokenizer_config.json or chat_template.jinja, or leave it out",
        )
    left_out = {*TOKENIZER_FILES, *_ALSO}
    for path in base.iterdir():
        if path.name in left_out or path.name.endswith((*WEIGHTS, ".index.json")):
            continue
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return combine(base, tokenizer, folder)
