"""The tokenizer of a run: the base's own files, byte for byte, and the chat template that training used."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgetune_converters.files import companions

TOKENIZER_FILES = (*companions.TOKENIZER_FILES, "generation_config.json", "config.json")
"""Files of a base that decide token ids, special tokens and stop tokens."""
TEMPLATE_FILE = companions.TEMPLATE_FILE


def save_tokenizer(base: Path, chat_template: str, folder: Path) -> None:
    """Copy the tokenizer files of `base` to `folder`, and write the chat template beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def changed_tokenizer_files(base: Path, chat_template: str, folder: Path) -> list[str]:
    """Return the names of the files in `folder` that `save_tokenizer` would now write differently."""
    wanted = {name: _content(base / name) for name in TOKENIZER_FILES}
    wanted[TEMPLATE_FILE] = chat_template.encode("utf-8")
    return [name for name, content in wanted.items() if content != _content(folder / name)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
