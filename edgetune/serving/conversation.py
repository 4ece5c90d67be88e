"""What a dialect asks for, without the dialect: a conversation, tools, the form of the answer, how it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgetune.runtime.sampling import Sampling
from edgetune.serving.api_errors import bad_request

_SEEDS = 2**32 - 1
MAX_CHOICES = 32


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of its arguments, an object in any case."""
        return self.parameters or {"type": "object"}

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.schema)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called, and which."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    """The one tool that must be called, with the mode "required"."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has made."""

    id: str
    name: str
    arguments: str
    """A JSON object, validated against the tool's schema."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates read them, and what the answer may be."""

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer."""
    schema_field: str = "response_format"
    """Name of the request field with the schema, for errors."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    messages_field: str = "messages"
    """Name of the request field with the messages, for errors."""

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.tool_choice.mode == "none":
            return ()
        named = self.tool_choice.name
        return self.tools if named is None else tuple(tool for tool in self.tools if tool.name == named)


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    """None: until the context is full."""
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """How many of the most likely tokens are returned with each token; None: no log-probabilities."""
    choices: int = 1


def seed_of(value: int | None, choice: int = 0) -> int | None:
    """Return the seed of the sampler for any integer; the choices of one request have different ones."""
    return None if value is None else (value + choice) % _SEEDS


def check_tools(tools: tuple[Tool, ...], choice: ToolChoice, field_name: str = "tool_choice") -> None:
    """Raise ApiError for two tools of one name, or a choice of a tool that is not there."""
    names = [tool.name for tool in tools]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise bad_request(f"two tools are called {doubled!r}", "tools")
    if choice.name is not None and choice.name not in names:
        raise bad_request(f"{field_name} names {choice.name!r}, which is not among the tools", field_name)
    if choice.mode == "required" and not tools:
        raise bad_request(f"{field_name} requires a call, but there are no tools", field_name)


# -- the answer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer with its log-probability and the most likely tokens at its place."""

    token: int
    raw: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Thought:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class TokenUsage:
    """Tokens that a request has cost."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        """Return the sum."""
        return TokenUsage(self.prompt + other.prompt, self.cached + other.cached, self.generated + other.generated)


@dataclass(frozen=True)
class End:
    """The end of an answer."""

    reason: Literal["stop", "length", "tool_calls"]
    usage: TokenUsage
    stop: str | None = None
    """The stop string that ended it."""


Delta = Text | Thought | ToolCall | End


def text_parts(content: Any, field_name: str) -> Iterator[str]:
    """Yield the texts of a message's content, which is a text or a list of parts.

    Raises:
        ApiError: A part is no text; with its field.
    """
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    for index, part in enumerate(content):
        text = getattr(part, "text", None)
        if text is None:
            text = getattr(part, "refusal", None)
        if text is None:
            kind = getattr(part, "type", type(part).__name__)
            raise bad_request(
                f"{field_name}.{index} is of type {kind!r}, but the model reads text only", f"{field_name}.{index}.type"
            )
        yield text
