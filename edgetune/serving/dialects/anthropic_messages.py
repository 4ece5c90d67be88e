"""Anthropic's messages and count_tokens, as Claude Code and the `anthropic` client send them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from edgetune.serving.api_errors import ApiError, anthropic_error, bad_request
from edgetune.serving.calls import SKIPPED_TOOLS_HEADER, Call, RouteSpec, new_id
from edgetune.serving.conversation import (
    Conversation,
    Decoding,
    Delta,
    End,
    Text,
    Thought,
    Tool,
    ToolCall,
    ToolChoice,
    check_tools,
    text_parts,
)
from edgetune.serving.prompting import prepare
from edgetune.serving.replies import ANTHROPIC_SSE, Event, Stream, TextTemplate
from edgetune.serving.request_fields import Fields
from edgetune.serving.sampling_fields import SamplingFields
from edgetune.serving.worker_threads import run_in_thread

_BILLING = "x-anthropic-billing-header:"
"""Claude Code's first system block, which changes with each request and would spoil the cache of the prompt."""


class ContentBlock(Fields):
    """A block of a message's content."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    source: Any = None
    title: str | None = None
    context: str | None = None
    cache_control: Any = None
    citations: Any = None


class AnthropicMessage(Fields):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Fields):
    """A tool."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: Any = None
    defer_loading: Any = None


class AnthropicChoice(Fields):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    """Whether the model reasons before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Any = None


class OutputFormat(Fields):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """The form of the answer, and the effort."""

    format: OutputFormat | None = None
    effort: Any = None


class CountRequest(SamplingFields):
    """The body of /v1/messages/count_tokens. Fields of type Any have no effect on a local server."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Any = None
    service_tier: Any = None
    context_management: Any = None
    cache_control: Any = None
    betas: Any = None


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None = None
    stream: bool | None = None


async def messages(call: Call[MessagesRequest]) -> Any:
    """Answer a conversation."""
    fields = call.fields
    model = await call.model(fields.model)
    sampling = fields.sampling(call.server.settings.sampling, model.runtime.vocabulary_size)
    call.note(SKIPPED_TOOLS_HEADER, (str(tool.type) for tool in fields.tools or () if not _is_callable(tool)))
    decoding = Decoding(sampling, fields.max_tokens, tuple(fields.stop_sequences or ()))
    conversation = _conversation(fields, model.runtime.chat_template)
    prompt_tokens, deltas = await call.answer(model, conversation, decoding)
    call.reply_headers["request-id"] = new_id("req_")
    head: dict[str, Any] = {
        "id": new_id("msg_"), "type": "message", "role": "assistant", "model": model.name, "content": [],
        "stop_reason": None, "stop_sequence": None,
        "usage": {
            "input_tokens": prompt_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }  # fmt: skip
    pieces = (delta async for _, delta in deltas)
    if fields.stream:
        return Stream(_events(pieces, head), ANTHROPIC_SSE, _stream_error)
    return await _whole(pieces, head)


async def count_tokens(call: Call[CountRequest]) -> Any:
    """Count the tokens of a conversation."""
    model = await call.model(call.fields.model)
    conversation = _conversation(call.fields, model.runtime.chat_template)
    check_tools(conversation.tools, conversation.tool_choice)
    prepared = await run_in_thread(prepare, model.runtime, conversation)
    return {"input_tokens": len(prepared.ids)}


# -- requests ----------------------------------------------------------------------------------------------------------


def _conversation(fields: CountRequest, template: Any) -> Conversation:
    found = list(_system(fields.system))
    for index, message in enumerate(fields.messages):
        found += _messages_of(message, f"messages.{index}.content")
    form = fields.output_format or (fields.output_config.format if fields.output_config else None)
    choice = fields.tool_choice
    return Conversation(
        _with_names(found),
        tuple(_tools(fields.tools or ())),
        _tool_choice(choice),
        not (choice is not None and choice.disable_parallel_tool_use),
        form.schema_ if form is not None else None,
        "output_config.format.schema",
        _thinking_options(fields.thinking, template),
    )


def _system(system: str | list[ContentBlock] | None) -> Iterator[dict[str, Any]]:
    parts = list(text_parts(system, "system"))
    text = "\n\n".join(part for part in parts if not part.startswith(_BILLING))
    if text:
        yield {"role": "system", "content": text}


def _messages_of(message: AnthropicMessage, name: str) -> Iterator[dict[str, Any]]:
    """Yield a message as chat templates read it; results of tools are messages of their own, before the rest."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(message.content):
        place = f"{name}.{index}"
        match block.type:
            case "text":
                texts.append(_required(block.text, f"{place}.text"))
            case "thinking":
                thoughts.append(_required(block.thinking, f"{place}.thinking"))
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_call(block, place))
            case "tool_result":
                text = "".join(text_parts(block.content, f"{place}.content"))
                id_ = _required(block.tool_use_id, f"{place}.tool_use_id")
                yield {"role": "tool", "tool_call_id": id_, "content": f"Error: {text}" if block.is_error else text}
            case "document" if (document := _document(block)) is not None:
                texts.append(document)
            case "search_result":
                text = "".join(text_parts(block.content, f"{place}.content"))
                texts.append("\n".join(filter(None, (block.title, str(block.source or ""), text))) + "\n")
            case other:
                raise bad_request(
                    f"{place} is of type {other!r}, which the model cannot read: it reads text", f"{place}.type"
                )
    if texts or calls or thoughts or not message.content:
        found: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
        if calls:
            found["tool_calls"] = calls
        if thoughts:
            found["reasoning_content"] = "".join(thoughts)
        yield found


def _document(block: ContentBlock) -> str | None:
    """Return title, context and text of a document that is a text; None for a PDF or a file."""
    source = block.source if isinstance(block.source, dict) else {}
    content: Any = None
    if source.get("type") == "text":
        content = source.get("data")
    elif source.get("type") == "content":
        content = source.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in texts else "".join(map(str, texts))
    if not isinstance(content, str):
        return None
    return "\n".join(filter(None, (block.title, block.context, content))) + "\n"


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise bad_request(f"the field {name} is missing", name)
    return value


def _call(block: ContentBlock, place: str) -> dict[str, Any]:
    function = {"name": _required(block.name, f"{place}.name"), "arguments": json.dumps(block.input or {})}
    return {"id": block.id or "", "type": "function", "function": function}


def _with_names(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {call["id"]: call["function"]["name"] for each in found for call in each.get("tool_calls", ())}
    for each in found:
        if each["role"] == "tool" and each["tool_call_id"] in names:
            each["name"] = names[each["tool_call_id"]]
    return found


def _is_callable(tool: AnthropicTool) -> bool:
    return tool.type in (None, "custom")


def _tools(given: Sequence[AnthropicTool]) -> Iterator[Tool]:
    """Yield the tools with a schema; those that Anthropic runs itself, such as web_search, are none here."""
    for tool in given:
        if _is_callable(tool):
            yield Tool(tool.name, tool.description or "", tool.input_schema or {})


def _tool_choice(choice: AnthropicChoice | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    if choice.type == "tool":
        return ToolChoice("required", _required(choice.name, "tool_choice.name"))
    return ToolChoice({"auto": "auto", "any": "required", "none": "none"}[choice.type])  # type: ignore[arg-type]


def _thinking_options(thinking: Thinking | None, template: Any) -> dict[str, Any]:
    if thinking is None or template is None or "enable_thinking" not in template.option_names:
        return {}
    return {"enable_thinking": thinking.type != "disabled"}


# -- replies -----------------------------------------------------------------------------------------------------------


def _stream_error(error: ApiError) -> list[Event]:
    return [Event(anthropic_error(error), "error")]


def _reason(end: End) -> dict[str, Any]:
    word = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[end.reason]
    return {"stop_reason": "stop_sequence" if end.stop is not None else word, "stop_sequence": end.stop}


def _usage(end: End) -> dict[str, Any]:
    """Return the usage: input_tokens are those that were not in the cache, as in Anthropic's API."""
    usage = end.usage
    return {
        "input_tokens": usage.prompt - usage.cached, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached, "output_tokens": usage.generated,
    }  # fmt: skip


_DELTA = "content_block_delta"


class _Blocks:
    """The blocks of a streamed message: each is begun, continued and ended."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: str | None = None
        self._delta = TextTemplate(lambda text: text)
        """A further piece of the block of text or reasoning."""

    def add(self, delta: Delta) -> Iterator[Event]:
        match delta:
            case Thought(text):
                yield from self._begin("thinking", {"thinking": "", "signature": ""})
                yield Event(self._delta.fill(text), _DELTA)
            case Text(text) if text:
                yield from self._begin("text", {"text": ""})
                yield Event(self._delta.fill(text), _DELTA)
            case ToolCall():
                yield from self.end()
                yield from self._begin("tool_use", {"id": _tool_id(delta), "name": delta.name, "input": {}})
                yield self._continue({"type": "input_json_delta", "partial_json": delta.arguments})
                yield from self.end()

    def _begin(self, kind: str, content: dict[str, Any]) -> Iterator[Event]:
        if self._kind == kind:
            return
        yield from self.end()
        self._index += 1
        self._kind = kind
        block = {"type": kind, **content}
        self._delta = TextTemplate(lambda text: self._continue({"type": f"{kind}_delta", kind: text}).data)
        yield _event("content_block_start", index=self._index, content_block=block)

    def _continue(self, delta: dict[str, Any]) -> Event:
        return _event(_DELTA, index=self._index, delta=delta)

    def end(self) -> Iterator[Event]:
        if self._kind is not None:
            if self._kind == "thinking":
                yield self._continue({"type": "signature_delta", "signature": ""})
            self._kind = None
            yield _event("content_block_stop", index=self._index)


def _tool_id(call: ToolCall) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def _event(name: str, **data: Any) -> Event:
    return Event({"type": name, **data}, name)


async def _events(deltas: AsyncIterator[Delta], head: dict[str, Any]) -> AsyncIterator[Event]:
    yield _event("message_start", message=head)
    blocks = _Blocks()
    async for delta in deltas:
        for event in blocks.add(delta):
            yield event
        if isinstance(delta, End):
            for event in blocks.end():
                yield event
            yield _event("message_delta", delta=_reason(delta), usage=_usage(delta))
    yield _event("message_stop")


async def _whole(deltas: AsyncIterator[Delta], head: dict[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    async for delta in deltas:
        match delta:
            case Thought(text):
                _extend(content, "thinking", text)
            case Text(text) if text:
                _extend(content, "text", text)
            case ToolCall():
                arguments = json.loads(delta.arguments)
                content.append({"type": "tool_use", "id": _tool_id(delta), "name": delta.name, "input": arguments})
            case End():
                head |= _reason(delta) | {"usage": _usage(delta)}
    for block in content:
        if block["type"] == "thinking":
            block["signature"] = ""
    return {**head, "content": content}


def _extend(content: list[dict[str, Any]], kind: str, text: str) -> None:
    if content and content[-1]["type"] == kind:
        content[-1][kind] += text
    else:
        content.append({"type": kind, kind: text})


ROUTES = (
    RouteSpec("POST", "/v1/messages", messages, anthropic_error, MessagesRequest),
    RouteSpec("POST", "/v1/messages/count_tokens", count_tokens, anthropic_error, CountRequest),
)
