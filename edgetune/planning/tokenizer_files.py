"""The tokenizer of a run: the base's own files, byte for byte, and the chat template that training used.

tokenizer_config.json is changed where the class that it names, or none, makes transformers build another tokenizer than
tokenizer.json, and tokenizer.json where it truncates or pads texts.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.data.chat import ChatTemplate, named_templates, special_tokens
from edgetune_converters.files import companions
from edgetune_converters.tokenizers import chat_files

TOKENIZER_FILES = (*companions.TOKENIZER_FILES, "generation_config.json", "config.json")
"""Files of a base that decide token ids, special tokens and stop tokens."""
TEMPLATE_FILE = companions.TEMPLATE_FILE
FAST_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers 4 and 5 that takes tokenizer.json as it is."""
_CONFIG = "tokenizer_config.json"


def save_tokenizer(base: Path, template: ChatTemplate, folder: Path, *, names_fast_class: bool = False) -> None:
    """Copy the tokenizer files of `base` to `folder`, and write its chat templates beside them, that of training first.

    With `names_fast_class`, tokenizer_config.json names FAST_CLASS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        content = companions.tokenizer_file(base, name)
        if name == _CONFIG and names_fast_class:
            content = _with_fast_class(base, content)
        if content is not None:
            (folder / name).write_bytes(content)
    for name, content in template_files(base, template).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def changed_tokenizer_files(base: Path, template: ChatTemplate, folder: Path) -> list[str]:
    """Return the names of the files in `folder` that `save_tokenizer` would now write differently."""
    wanted = {name: companions.tokenizer_file(base, name) for name in TOKENIZER_FILES}
    found = {name: companions.tokenizer_file(folder, name) for name in wanted}  # runs of old versions may truncate
    for name, content in template_files(base, template).items():
        there = companions.tokenizer_file(folder, name)
        if name == TEMPLATE_FILE or there is not None:  # runs of old versions hold no others
            wanted[name], found[name] = content, there
    if found[_CONFIG] == _with_fast_class(base, wanted[_CONFIG]):
        found[_CONFIG] = wanted[_CONFIG]
    return [name for name, content in wanted.items() if content != found[name]]


def template_files(base: Path, template: ChatTemplate) -> dict[str, bytes]:
    """Return the files of the templates of a base, with those that training uses in their places.

    Raises TokenizerError for a template whose name is no file name.
    """
    used = {chat_files.DEFAULT: template.source, chat_files.TOOL_USE: template.tool_use}
    named = {**named_templates(base), **{name: text for name, text in used.items() if text is not None}}
    return chat_files.template_files(named)


def _with_fast_class(base: Path, content: bytes | None) -> bytes:
    """Return tokenizer_config.json with FAST_CLASS, and the special tokens that the class before supplied."""
    stated = {} if content is None else json.loads(content)
    named = {name: text for name, text in special_tokens(base).items() if name.endswith("_token")}
    stated.pop("auto_map", None)  # Python code of the base, which is in no output
    stated = named | stated | {"tokenizer_class": FAST_CLASS}
    return (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
