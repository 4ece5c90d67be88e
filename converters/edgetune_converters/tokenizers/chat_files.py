"""Chat templates and named special tokens, from the files in which transformers 4 and 5 keep them.

One reader for training, export and the runtimes. It needs neither the tokenizer itself nor Jinja.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, string, strings

DEFAULT = "default"
"""The name of the template that is used unless another one is asked for."""
TEMPLATE_FILE = "chat_template.jinja"

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
    named = _configured(config.get("chat_template"))
    single = directory / TEMPLATE_FILE
    if single.is_file():
        named[DEFAULT] = _read(single)
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = _read(extra)
    return named


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


def _configured(stated: Any) -> dict[str, str]:
    """A template as text, or several as a list of {name, template}, or by name."""
    if isinstance(stated, str):
        return {DEFAULT: stated}
    if isinstance(stated, dict):
        stated = [{"name": name, "template": template} for name, template in stated.items()]
    entries = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
