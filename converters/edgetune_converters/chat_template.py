"""Render chat templates: the one Jinja sandbox of edgetune.

The environment behaves as transformers' `apply_chat_template` does (tests compare the two), so that a template renders
alike in training, in the tokenizer conversion, in the contract and in the runtimes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgetune_converters.errors import ChatTemplateError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and whatever else a template reads."""

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that the rendering itself sets; no option can have such a name."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message with its reasoning; a template may read any of the first two."""

# errors of operations inside a template, other than Jinja's own
_OPERATION_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class Clock:
    """The clock of `strftime_now` in a template: of this machine, or stopped at a moment in local time."""

    def __init__(self, moment: datetime | None = None) -> None:
        self.moment = moment
        self.is_read = False
        """Whether a rendering has asked for the time: only then does its text depend on it."""

    def strftime(self, form: str) -> str:
        """Return the time in a format of `datetime.strftime`."""
        self.is_read = True
        return (self.moment or datetime.now()).strftime(form)

    def __str__(self) -> str:
        """Return the moment as ISO 8601, to the second."""
        return (self.moment or datetime.now()).isoformat(timespec="seconds")


def render(
    source: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
) -> str:
    """Return the conversation as one text.

    Args:
        source: The Jinja text of the template.
        messages: The conversation.
        special_tokens: Texts by name: bos_token, eos_token ... An absent token is undefined in the template, not None.
        add_generation_prompt: End with the opening of the assistant's next turn.
        tools: JSON schemas of the tools that the template may describe.
        options: Further variables of the template (`chat_template_kwargs` of transformers), and `documents`.
        clock: The time that the template is told. Default: that of this machine.

    Raises:
        ChatTemplateError: The template is not valid Jinja, or refuses the conversation; with Jinja's own message.
    """
    template = compiled(source)
    variables = {"documents": None, **special_tokens, **(options or {})} | {
        "messages": [_with_reasoning(message) for message in messages],
        "tools": list(tools) if tools is not None else None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": (clock or Clock()).strftime,
    }
    try:
        return template.render(variables)
    except (jinja2.TemplateError, *_OPERATION_ERRORS) as error:
        raise ChatTemplateError(str(error)) from error


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """Compile a template. Raises ChatTemplateError with the line when it is not valid Jinja."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError) as error:  # blocks nested deeper than Python compiles
        raise ChatTemplateError(f"it cannot be compiled: {error}") from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return a message with its reasoning under both keys that templates read, as transformers passes it."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=32)
def option_names(source: str) -> tuple[str, ...]:
    """Return the variables that a template reads and that an option may set, in alphabetical order.

    A variable that the template itself sets counts only where the template asks whether it is defined.

    Raises:
        ChatTemplateError: The template is not valid Jinja.
    """
    compiled(source)
    tree = _environment().parse(source)
    names = jinja2.meta.find_undeclared_variables(tree)
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    asked = {
        node.node.name
        for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, jinja2.nodes.Name)
    }
    return tuple(sorted(name for name in names - (own - asked) - {*RESERVED} if not name.endswith("_token")))


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Sandboxed: a template is downloaded with a model and must not reach Python."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = Clock().strftime  # `render` passes its own; this makes the name known
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter, escape no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Namespace(jinja2.utils.Namespace):
    """Reject names that reach into Python, as transformers' own class does."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template must not store the attribute {name!r}")
        super().__setitem__(name, value)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` renders its body; edgetune's loss masks do not need the marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body in a scope of its own, as in transformers: what it sets is not seen behind the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
