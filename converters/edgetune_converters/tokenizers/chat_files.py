"""Chat templates and named special tokens, from the files in which transformers 4 and 5 keep them.

One reader for training, export and the runtimes. It needs neither the tokenizer itself nor Jinja.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, string, strings

DEFAULT = "default"
"""The name of the template that is used unless another one is asked for."""
TOOL_USE = "tool_use"
"""The name of the template that transformers uses for a conversation with tools."""
TEMPLATE_FILE = "chat_template.jinja"
EXTRA_FOLDER = "additional_chat_templates"
"""The folder of templates with other names, NAME.jinja each."""
JSON_FILE = "chat_template.json"
"""Where models with a processor keep a template, as JSON."""
_FILE_NAME = re.compile(r"\w[\w.-]*")

# tokens that a tokenizer class supplies where tokenizer_config.json does not name them, as in transformers 5
_CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a tokenizer directory by name; `config` is its tokenizer_config.json.

    A template in a file of its own takes precedence, as in transformers. Raises TokenizerError for an unreadable file.
    """
    named = _configured(_read_json(directory / JSON_FILE).get("chat_template"))
    named |= _configured(config.get("chat_template"))
    single = directory / TEMPLATE_FILE
    if single.is_file():
        named[DEFAULT] = _read(single)
    for extra in sorted((directory / EXTRA_FOLDER).glob("*.jinja")):
        named[extra.stem] = _read(extra)
    return named


def template_files(named: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files in which transformers 5 keeps some templates: path in the directory -> content.

    Raises TokenizerError for a name that is no file name.
    """
    wrong = next((name for name in named if not _FILE_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise TokenizerError(
            f"a chat template is called {wrong!r}, which is no name of a file", "Rename it in tokenizer_config.json"
        )
    paths = {name: TEMPLATE_FILE if name == DEFAULT else f"{EXTRA_FOLDER}/{name}.jinja" for name in named}
    return {paths[name]: text.encode("utf-8", "surrogatepass") for name, text in named.items()}


def copied_template_files(
    directory: Path, config: Mapping[str, Any], chat_template: str | None = None
) -> dict[str, bytes]:
    """Return the template files beside a copy of tokenizer_config.json, so that transformers finds the same set.

    None are needed where all templates stand in tokenizer_config.json; transformers ignores that entry once there is a
    file. `chat_template` replaces the default one. Raises TokenizerError.
    """
    named = chat_templates(directory, config)
    files = (directory / TEMPLATE_FILE).is_file() or named != _configured(config.get("chat_template"))
    if chat_template is None and not files:
        return {}
    return template_files(named if chat_template is None else {**named, DEFAULT: chat_template})


def template_metadata(named: Mapping[str, str]) -> dict[str, Value]:
    """Return the GGUF keys of some templates: the default one and those with other names."""
    others = {name: text for name, text in sorted(named.items()) if name != DEFAULT}
    found = {"tokenizer.chat_template": string(named[DEFAULT])} if DEFAULT in named else {}
    found |= {f"tokenizer.chat_template.{name}": string(text) for name, text in others.items()}
    if others:
        found["tokenizer.chat_templates"] = strings(list(others))
    return found


def special_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any], *, class_defaults: bool = True
) -> dict[str, str]:
    """Return the named special tokens (bos_token, eos_token ...) of a tokenizer, in every form of transformers 4 and 5.

    Args:
        config: tokenizer_config.json. A token that it sets to null has no entry.
        special_map: special_tokens_map.json, {} where there is none.
        class_defaults: Include the tokens that transformers' tokenizer class supplies where the files name none.
    """
    found: dict[str, Any] = dict(_CLASS_TOKENS.get(_slow_name(config.get("tokenizer_class")), {}))
    found = found if class_defaults else {}
    found |= _token_entries(config)
    if "added_tokens_decoder" not in config:  # the older form, in which special_tokens_map.json takes precedence
        found |= _token_entries(special_map)
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(group), dict):
            found |= config[group]
    return {name: text for name, value in found.items() if (text := token_text(value)) is not None}


def token_text(value: Any) -> str | None:
    """Return the text of a special token written as a string or as {"content": ...}; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _slow_name(name: Any) -> str:
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _token_entries(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name.endswith("_token") and not isinstance(value, bool)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read the chat template {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    try:
        found = json.loads(_read(path)) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"cannot read the chat template {path}: {error}") from error
    return found if isinstance(found, dict) else {}


def _configured(stated: Any) -> dict[str, str]:
    """A template as text, or several as a list of {name, template}, or by name."""
    if isinstance(stated, str):
        return {DEFAULT: stated}
    if isinstance(stated, dict):
        stated = [{"name": name, "template": template} for name, template in stated.items()]
    entries = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
