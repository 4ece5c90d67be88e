"""Chat templates: rendering conversations to the text that a model is trained on and prompted with.

The environment behaves as transformers' `apply_chat_template` does (tests compare the two), so that a template renders
alike in training, in the contract and in the runtime. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgetune.errors import DataError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and whatever else a template reads."""

BUILT_IN = ("chatml", "alpaca", "plain")
NO_TEMPLATE_HINT = "Set data.chat_template: alpaca (or chatml, plain, or the path of a .jinja file)."
_TEMPLATES = Path(__file__).parent / "templates"

# Tokens that a tokenizer class supplies where tokenizer_config.json does not name them, as in transformers 5.
_CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


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

    @classmethod
    def from_directory(cls, directory: Path, override: str | None = None) -> ChatTemplate:
        """The template of a tokenizer directory, or `override` (a .jinja file or a built-in name) with its tokens.

        Raises DataError when there is no template, and says which ones are built in.
        """
        found = cls.find(directory, override)
        if found is None:
            raise DataError(f"the base in {directory} has no chat template", NO_TEMPLATE_HINT)
        return found

    @classmethod
    def find(cls, directory: Path, override: str | None = None) -> ChatTemplate | None:
        """As `from_directory`, but None when there is no template."""
        tokens = special_tokens(directory)
        source = read_override(override) if override else _own_source(directory)
        if source is None:
            return None
        named = {name: token for name, token in tokens.items() if name not in ("bos_token", "eos_token")}
        return cls(source, tokens.get("bos_token"), tokens.get("eos_token"), named)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """The template in a GGUF file's metadata, with the special tokens that it may name; None without one."""
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            return None
        texts: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in _GGUF_TOKENS.items()}
        named = {name: texts[id_] for name, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(texts)}
        return cls(source, named.pop("bos_token", None), named.pop("eos_token", None), named)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as one text; with `add_generation_prompt`, up to where the assistant's answer begins.

        Raises DataError with the template's own words when the template refuses the conversation.
        """
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, **self.other_tokens}
        variables = {name: token for name, token in tokens.items() if token is not None}
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages],
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise self._refusal(messages, error) from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # raised by operations inside the template
            raise self._refusal(messages, error) from None

    @staticmethod
    def _refusal(messages: Sequence[Message], error: Exception) -> DataError:
        roles = ", ".join(str(message.get("role")) for message in messages)
        return DataError(
            f"the chat template refuses a conversation of {roles or 'no messages'}: {error}",
            "Change the rows, or use another template (data.chat_template).",
        )


def read_override(override: str) -> str:
    """The Jinja text of a built-in template or of a .jinja file; DataError if it is neither."""
    if override in BUILT_IN:
        return (_TEMPLATES / f"{override}.jinja").read_text(encoding="utf-8")
    path = Path(override).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"data.chat_template: {override!r} is neither a readable .jinja file nor one of {', '.join(BUILT_IN)}",
            NO_TEMPLATE_HINT,
        ) from None


def special_tokens(directory: Path) -> dict[str, str]:
    """Named special tokens (bos_token, eos_token, ...) of a tokenizer directory, in every form of transformers 4 and 5.

    A token that tokenizer_config.json sets to null has no entry.
    """
    config = _read_json(directory / "tokenizer_config.json")
    found: dict[str, Any] = dict(_CLASS_TOKENS.get(_slow_name(config.get("tokenizer_class")), {}))
    found |= _token_entries(config)
    if "added_tokens_decoder" not in config:  # the older form, in which special_tokens_map.json has the last word
        found |= _token_entries(_read_json(directory / "special_tokens_map.json"))
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(group), dict):
            found |= config[group]
    return {name: text for name, value in found.items() if (text := token_text(value)) is not None}


def token_text(value: Any) -> str | None:
    """The text of a special token written as a string, as {"content": ...}, or not at all."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _slow_name(name: Any) -> str:
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _token_entries(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name.endswith("_token") and not isinstance(value, bool)}


def _own_source(directory: Path) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object", "Restore the base's files.")
    return value


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", NO_TEMPLATE_HINT
        ) from None


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Sandboxed: a template comes with a download and must not reach Python."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Namespace(jinja2.utils.Namespace):
    """Rejects names that reach into Python, as transformers' own does."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template must not store the attribute {name!r}")
        super().__setitem__(name, value)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` renders its body; our masks do not need the marks (DESIGN 7.3)."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body's nodes in place of the block."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))
