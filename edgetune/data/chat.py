"""The chat template of a base, a .jinja file or an exported file, with the special tokens that it may name.

Rendering is `edgetune_converters.chat_template`, which training, tokenizer conversion and runtimes share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgetune.errors import ConfigError, DataError
from edgetune_converters import chat_template
from edgetune_converters.chat_template import Clock, Message
from edgetune_converters.errors import ChatTemplateError, TokenizerError
from edgetune_converters.gguf import keys
from edgetune_converters.tokenizers import chat_files

__all__ = ["BUILT_IN", "NO_TEMPLATE_HINT", "ChatTemplate", "Message", "read_override", "special_tokens"]

BUILT_IN = ("chatml", "alpaca", "plain")
NO_TEMPLATE_HINT = "Set data.chat_template: alpaca (or chatml, plain, or the path of a .jinja file)."
_TEMPLATES = Path(__file__).parent / "templates"

_GGUF_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the special tokens that it may name."""

    source: str
    """The Jinja text."""
    bos_token: str | None = None
    """The token that starts a text, if the tokenizer has one."""
    eos_token: str | None = None
    """The token that ends a text, if the tokenizer has one."""
    other_tokens: Mapping[str, str] = field(default_factory=dict)
    """Further named tokens: pad_token, unk_token, image_token ..."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the template reads beside the conversation, such as enable_thinking."""
    clock: Clock = field(default_factory=Clock, compare=False)
    """The time that the template is told."""
    tool_use: str | None = None
    """The Jinja text of the template that transformers uses for a conversation with tools, if there is one."""

    @classmethod
    def from_directory(
        cls, directory: Path, override: str | None = None, options: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """Return the template of a tokenizer directory, or `override` (a .jinja file or a built-in name).

        Its special tokens are those of the directory. Raises DataError when there is no template, ConfigError for
        options that the template does not read.
        """
        found = cls.find(directory, override)
        if found is None:
            raise _no_template_error(directory)
        found.check_options(options or {})
        return found.with_options(options or {})

    @classmethod
    def find(cls, directory: Path, override: str | None = None) -> ChatTemplate | None:
        """As `from_directory`, but return None when there is no default template."""
        tokens, templates = special_tokens(directory), named_templates(directory)
        source = read_override(override, templates) if override else templates.get(chat_files.DEFAULT)
        if source is None:
            return None
        tool_use = templates.get(chat_files.TOOL_USE)
        named = {name: token for name, token in tokens.items() if name not in ("bos_token", "eos_token")}
        return cls(
            source, tokens.get("bos_token"), tokens.get("eos_token"), named,
            tool_use=tool_use if tool_use is None or override is None else source,
        )  # fmt: skip

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """Return the template in a GGUF file's metadata, with its special tokens; None without one."""
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            return None
        texts: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in _GGUF_TOKENS.items()}
        named = {name: texts[id_] for name, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(texts)}
        tokens = (named.pop("bos_token", None), named.pop("eos_token", None), named)
        tool_use = metadata.get(f"tokenizer.chat_template.{chat_files.TOOL_USE}")
        return cls(source, *tokens, stored_options(metadata), tool_use=tool_use if isinstance(tool_use, str) else None)

    def with_options(self, options: Mapping[str, Any]) -> ChatTemplate:
        """Return the template with further options; they replace those of the same name."""
        return replace(self, options={**self.options, **options}) if options else self

    def at(self, moment: datetime | str | None) -> ChatTemplate:
        """Return the template with its clock stopped at a moment (ISO 8601, local time); None: as it is.

        Raises ValueError for a text that is no time.
        """
        if moment is None:
            return self
        return replace(self, clock=Clock(datetime.fromisoformat(moment) if isinstance(moment, str) else moment))

    def source_for(self, tools: Any) -> str:
        """Return the Jinja text for a conversation with these tools (None: without tools), as transformers chooses."""
        return self.source if tools is None or self.tool_use is None else self.tool_use

    def describe_rendering(self, tools: Any) -> dict[str, Any]:
        """Return what a stored conversation needs so that `as_rendered` finds the template again, after rendering."""
        moment = {"rendered_at": str(self.clock)} if self.clock.is_read else {}
        return moment | ({"template": chat_files.TOOL_USE} if self.source_for(tools) != self.source else {})

    def as_rendered(self, stored: Mapping[str, Any]) -> ChatTemplate:
        """Return the template with which a stored conversation was rendered: options, moment, and named template."""
        template = self.with_options(stored.get("options", {})).at(stored.get("rendered_at"))
        return template if stored.get("template") == chat_files.TOOL_USE else replace(template, tool_use=None)

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of the variables that an option can set. Raises DataError if the template is not valid Jinja."""
        self.check_syntax()
        sources = (self.source, self.tool_use or self.source)
        return tuple(sorted({name for source in sources for name in chat_template.option_names(source)}))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigError for an option that the template does not read, or whose name is reserved."""
        for name in options:
            if name in chat_template.RESERVED:
                raise ConfigError(
                    f"the template option {name} is reserved: {', '.join(chat_template.RESERVED)} come from the rows",
                    "Remove it",
                )
            if name not in self.option_names:
                known = ", ".join(self.option_names)
                raise ConfigError(
                    f"the chat template does not read the option {name}",
                    f"It reads {known}" if known else "It reads no options: remove it",
                )

    def check_syntax(self, tools: Any = None) -> None:
        """Raise DataError if the template, for conversations with these tools, is not valid Jinja text."""
        source = self.source_for(tools)
        try:
            source.encode("utf-8")
            chat_template.compiled(source)
        except ChatTemplateError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}", NO_TEMPLATE_HINT) from None
        except UnicodeEncodeError as error:
            code = ord(source[error.start])
            raise DataError(f"the chat template holds half a character (U+{code:04X})", NO_TEMPLATE_HINT) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the conversation as one text; with `add_generation_prompt`, up to where the assistant's answer begins.

        Raises DataError with the template's own message when the template refuses the conversation.
        """
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, **self.other_tokens}
        named = {name: token for name, token in tokens.items() if token is not None}
        self.check_syntax(tools)
        try:
            return chat_template.render(
                self.source_for(tools),
                messages,
                named,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                options=self.options,
                clock=self.clock,
            )
        except ChatTemplateError as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses a conversation of {roles or 'no messages'}: {error}",
                "Change the rows, or use another template (data.chat_template)",
            ) from None


def stored_options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template options in the metadata of an exported file. Raises DataError if they cannot be read."""
    text = metadata.get(keys.TEMPLATE_OPTIONS)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{keys.TEMPLATE_OPTIONS} of the file is not a JSON object", "Export the file again")
    return found


def options_metadata(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata that keeps template options in an exported file."""
    return {keys.TEMPLATE_OPTIONS: json.dumps(options, separators=(",", ":"), sort_keys=True)} if options else {}


def read_override(override: str, named: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the Jinja text of a built-in template, of one of the `named` ones of a base, or of a .jinja file.

    Raises DataError for anything else.
    """
    if override in BUILT_IN:
        return (_TEMPLATES / f"{override}.jinja").read_text(encoding="utf-8")
    if override in named:
        return named[override]
    path = Path(override).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        names = ", ".join((*BUILT_IN, *named))
        raise DataError(
            f"data.chat_template: {override!r} is neither a readable .jinja file nor one of {names}", NO_TEMPLATE_HINT
        ) from None


def _no_template_error(directory: Path) -> DataError:
    names = list(named_templates(directory))
    if not names:
        return DataError(f"the base in {directory} has no chat template", NO_TEMPLATE_HINT)
    return DataError(
        f"the base in {directory} has no default chat template; its templates are called {', '.join(names)}",
        f"Choose one of them: data.chat_template: {names[0]}",
    )


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the named special tokens (bos_token, eos_token, ...) of a tokenizer directory.

    Raises DataError when one of its files is damaged.
    """
    config = _read_json(directory / "tokenizer_config.json")
    return chat_files.special_tokens(config, _read_json(directory / "special_tokens_map.json"))


def named_templates(directory: Path) -> dict[str, str]:
    """Return the chat templates of a tokenizer directory by name. Raises DataError when a file is damaged."""
    config = _read_json(directory / "tokenizer_config.json")
    try:
        return chat_files.chat_templates(directory, config)
    except TokenizerError as error:
        raise DataError(error.message, "Restore the base's files") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object", "Restore the base's files")
    return value
