"""Chat templates, from where transformers 4 and 5 keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, string, strings
from edgetune_converters.tokenizers.files import TokenizerFiles


def metadata(files: TokenizerFiles, override: str | None) -> dict[str, Value]:
    """The default chat template and named ones; chat_template.jinja goes before tokenizer_config.json."""
    named = _configured(files.config.get("chat_template"))
    single = files.path / "chat_template.jinja"
    if single.is_file():
        named["default"] = _read(single)
    for extra in sorted((files.path / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = _read(extra)
    if override is not None:
        named["default"] = override
    default = named.pop("default", None)
    found = {} if default is None else {"tokenizer.chat_template": string(default)}
    found |= {f"tokenizer.chat_template.{name}": string(text) for name, text in sorted(named.items())}
    if named:
        found["tokenizer.chat_templates"] = strings(sorted(named))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read the chat template {path}: {error}") from error


def _configured(stated: Any) -> dict[str, str]:
    """A template as text, or several as a list of {name, template}, or by name."""
    if isinstance(stated, str):
        return {"default": stated}
    if isinstance(stated, dict):
        stated = [{"name": name, "template": template} for name, template in stated.items()]
    entries = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
