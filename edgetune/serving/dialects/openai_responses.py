"""OpenAI's responses, stateless, as Codex and other coding agents send them.

Tools of other kinds than functions are skipped, since only the client or OpenAI could run them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from edgetune.serving.api_errors import ApiError, bad_request, openai_error, word_of
from edgetune.serving.calls import SKIPPED_TOOLS_HEADER, Call, RouteSpec, new_id
from edgetune.serving.conversation import (
    Conversation,
    Decoding,
    Delta,
    End,
    Text,
    Thought,
    TokenUsage,
    Tool,
    ToolCall,
    ToolChoice,
    text_parts,
)
from edgetune.serving.dialects.openai_chat import merge_system
from edgetune.serving.replies import SSE, Event, Stream
from edgetune.serving.request_fields import Fields
from edgetune.serving.sampling_fields import SamplingFields

_SKIPPED_ITEMS_HEADER = "x-edgetune-skipped-items"
_READ_ITEMS = frozenset({"message", "function_call", "function_call_output", "reasoning", "item_reference"})
"""Types of items that are read; others are calls of tools that only OpenAI or the client runs, and their results."""


class InputPart(Fields):
    """A part of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


class InputItem(Fields):
    """An item of the input: a message, a call, the result of a call, or reasoning."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    id: Any = None
    status: Any = None
    phase: Any = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: Any = None
    encrypted_content: Any = None


class ResponseTool(Fields):
    """A tool; the schema is beside its name, not in an object `function`."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Fields):
    """The tool that must be called, or the tools that may be."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class TextFormat(Fields):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Fields):
    """How the text of the answer is."""

    format: TextFormat | None = None
    verbosity: Any = None


class Reasoning(Fields):
    """How the model reasons."""

    effort: str | None = None
    summary: Any = None


class ResponsesRequest(SamplingFields):
    """The body of /v1/responses. Fields of type Any have no effect on a local server."""

    model: str | None = None
    input: str | list[InputItem] = ""
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    store: Any = None
    include: Any = None
    metadata: Any = None
    client_metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    stream_options: Any = None
    truncation: Any = None
    user: Any = None


async def responses(call: Call[ResponsesRequest]) -> Any:
    """Answer a conversation."""
    fields = call.fields
    _refuse_state(fields)
    model = await call.model(fields.model)
    sampling = fields.sampling(call.server.settings.sampling, model.runtime.vocabulary_size)
    conversation = _conversation(fields, model.runtime.chat_template)
    call.note(SKIPPED_TOOLS_HEADER, (tool.type for tool in fields.tools or () if tool.type != "function"))
    items = () if isinstance(fields.input, str) else fields.input
    call.note(_SKIPPED_ITEMS_HEADER, (item.type for item in items if item.type not in _READ_ITEMS))
    _, deltas = await call.answer(model, conversation, Decoding(sampling, fields.max_output_tokens))
    writer = _Writer(_head(call, model.name))
    events = writer.events(delta async for _, delta in deltas)
    if fields.stream:
        return Stream(events, SSE, writer.fail)
    last: Event | None = None
    async for event in events:
        last = event
    assert last is not None
    return last.data["response"]


def _refuse_state(fields: ResponsesRequest) -> None:
    if fields.previous_response_id:
        raise bad_request(
            f"there is no response {fields.previous_response_id!r}: this server keeps none; send the whole "
            "conversation as input",
            "previous_response_id",
            "previous_response_not_found",
        )  # fmt: skip
    if fields.conversation is not None:
        raise bad_request("conversation: this server keeps none; send the whole conversation as input", "conversation")
    if fields.prompt is not None:
        raise bad_request("prompt: this server keeps no prompt templates; send input and instructions", "prompt")
    if fields.background:
        raise bad_request("background: this server keeps no responses; send stream", "background")


def _conversation(fields: ResponsesRequest, template: Any) -> Conversation:
    form = fields.text.format if fields.text else None
    schema = None
    if form is not None and form.type != "text":
        schema = form.schema_ if form.type == "json_schema" else {"type": "object"}
        if schema is None:
            raise bad_request("the field text.format.schema is missing", "text.format.schema")
    options: dict[str, Any] = {}
    effort = fields.reasoning.effort if fields.reasoning else None
    if effort is not None and template is not None and "reasoning_effort" in template.option_names:
        options["reasoning_effort"] = effort
    tools = tuple(
        Tool(_required(tool.name, f"tools.{index}.name"), tool.description or "", tool.parameters or {})
        for index, tool in enumerate(fields.tools or ())
        if tool.type == "function"
    )
    messages = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    items = [InputItem(role="user", content=fields.input)] if isinstance(fields.input, str) else fields.input
    messages += _messages(items)
    if all(message["role"] == "system" for message in messages):
        messages.append({"role": "user", "content": ""})  # the probe of an agent
    return Conversation(
        merge_system(messages), tools, _tool_choice(fields.tool_choice), fields.parallel_tool_calls is not False,
        schema, "text.format.schema", options, "input",
    )  # fmt: skip


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise bad_request(f"the field {name} is missing", name)
    return value


def _tool_choice(given: str | NamedChoice | None) -> ToolChoice:
    if isinstance(given, NamedChoice):
        if given.type == "function":
            return ToolChoice("required", _required(given.name, "tool_choice.name"))
        raise bad_request(f"tool_choice of type {given.type!r} is not supported; send function", "tool_choice.type")
    return ToolChoice(given) if given else ToolChoice()  # type: ignore[arg-type]


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return the items as chat templates read messages: reasoning and calls join the assistant's message."""
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, item in enumerate(items):
        place = f"input.{index}"
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else _required(item.role, f"{place}.role")
                text = "".join(text_parts(item.content, f"{place}.content"))
                if role == "assistant":
                    _assistant(found)["content"] += text
                else:
                    found.append({"role": role, "content": text})
            case "function_call":
                name = _required(item.name, f"{place}.name")
                names[_required(item.call_id, f"{place}.call_id")] = name
                function = {"name": name, "arguments": item.arguments or "{}"}
                made = {"id": item.call_id, "type": "function", "function": function}
                _assistant(found).setdefault("tool_calls", []).append(made)
            case "function_call_output":
                id_ = _required(item.call_id, f"{place}.call_id")
                text = "".join(text_parts(item.output, f"{place}.output"))
                result = {"role": "tool", "tool_call_id": id_, "content": text}
                found.append(result | ({"name": names[id_]} if id_ in names else {}))
            case "reasoning":
                text = "".join(text_parts(item.content, f"{place}.content"))
                if text:
                    _assistant(found)["reasoning_content"] = text
            case "item_reference":
                raise bad_request(f"{place}: this server keeps no items; send the whole item", place)
            case _:  # named in a header
                pass
    return found


def _assistant(found: list[dict[str, Any]]) -> dict[str, Any]:
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


# -- replies -----------------------------------------------------------------------------------------------------------


def _head(call: Call[ResponsesRequest], name: str) -> dict[str, Any]:
    fields = call.fields
    form = fields.text.format.model_dump(by_alias=True, exclude_none=True) if fields.text and fields.text.format else {}
    choice = fields.tool_choice
    return {
        "id": new_id("resp_"), "object": "response", "created_at": call.created, "status": "in_progress",
        "error": None, "incomplete_details": None, "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens, "model": name, "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False, "previous_response_id": None,
        "reasoning": {"effort": fields.reasoning.effort if fields.reasoning else None, "summary": None},
        "store": False, "temperature": fields.temperature, "text": {"format": form or {"type": "text"}},
        "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, NamedChoice) else choice or "auto",
        "tools": [tool.model_dump() for tool in fields.tools or () if tool.type == "function"],
        "top_p": fields.top_p, "truncation": "disabled", "usage": None, "user": fields.user,
        "metadata": fields.metadata or {},
    }  # fmt: skip


class _Writer:
    """The events of a response, and the response that they describe."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._response = head
        self._number = -1
        self._item: dict[str, Any] | None = None

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[Event]:
        """Yield the events of a response."""
        yield self._event("response.created", response=dict(self._response))
        yield self._event("response.in_progress", response=dict(self._response))
        async for delta in deltas:
            match delta:
                case Thought(text):
                    for event in self._text("reasoning", "reasoning_text", text):
                        yield event
                case Text(text) if text:
                    for event in self._text("message", "output_text", text):
                        yield event
                case ToolCall():
                    for event in (*self._close(), *self._call(delta)):
                        yield event
                case End():
                    for event in self._close():
                        yield event
                    yield self._finish(delta)

    def fail(self, error: ApiError) -> list[Event]:
        """Return the last event of a response that fails."""
        self._response |= {"status": "failed", "error": {"code": word_of(error.status), "message": error.message}}
        return [self._event("response.failed", response=self._response)]

    def _event(self, kind: str, **data: Any) -> Event:
        self._number += 1
        return Event({"type": kind, "sequence_number": self._number, **data}, kind)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._response["output"])}

    def _text(self, kind: str, part: str, text: str) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            yield from self._close()
            yield from self._open(kind, part)
        assert self._item is not None
        self._item["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if part == "output_text" else {}
        yield self._event(f"response.{part}.delta", **self._place, content_index=0, delta=text, **more)

    def _open(self, kind: str, part: str) -> Iterator[Event]:
        if kind == "message":
            self._item = {"id": new_id("msg_"), "type": kind, "status": "in_progress", "role": "assistant"}
        else:
            self._item = {"id": new_id("rs_"), "type": kind, "summary": []}
        output = self._place["output_index"]
        yield self._event("response.output_item.added", output_index=output, item={**self._item, "content": []})
        self._item["content"] = [_part(part, "")]
        yield self._event("response.content_part.added", **self._place, content_index=0, part=_part(part, ""))

    def _close(self) -> Iterator[Event]:
        """End the item that is being written."""
        item = self._item
        if item is None:
            return
        part = item["content"][0]
        kind = part["type"]
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._event(f"response.{kind}.done", **self._place, content_index=0, text=part["text"], **more)
        yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        if item["type"] == "message":
            item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=self._place["output_index"], item=item)
        self._response["output"].append(item)
        self._item = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = {
            "id": new_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": call.id,
            "name": call.name, "arguments": "",
        }  # fmt: skip
        place = {"item_id": item["id"], "output_index": len(self._response["output"])}
        yield self._event("response.output_item.added", output_index=place["output_index"], item=dict(item))
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event(
            "response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name
        )  # fmt: skip
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)
        self._response["output"].append(item)

    def _finish(self, end: End) -> Event:
        is_cut = end.reason == "length"
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": _usage(end.usage),
        }
        return self._event(f"response.{self._response['status']}", response=self._response)


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.generated, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.generated,
    }  # fmt: skip


ROUTES = (RouteSpec("POST", "/v1/responses", responses, openai_error, ResponsesRequest),)
