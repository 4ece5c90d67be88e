"""The copy of the base's tokenizer in a run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgetune.runs.paths import RunPaths

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "config.json",
)  # fmt: skip
_TEMPLATE = "chat_template.jinja"


def save_tokenizer(run: RunPaths, base: Path, chat_template: str) -> None:
    """Copy the base's tokenizer files unchanged and write the chat template of the training."""
    run.tokenizer.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, run.tokenizer / name)
    (run.tokenizer / _TEMPLATE).write_text(chat_template, encoding="utf-8")


def changed_tokenizer_files(run: RunPaths, base: Path, chat_template: str) -> list[str]:
    """Return the names of the files that `save_tokenizer` would change."""
    expected = {name: _bytes(base / name) for name in TOKENIZER_FILES} | {_TEMPLATE: chat_template.encode("utf-8")}
    return [name for name, content in expected.items() if content != _bytes(run.tokenizer / name)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
