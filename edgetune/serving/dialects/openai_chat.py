"""OpenAI's chat completions, and the list of models."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from edgetune.serving.api_errors import ApiError, bad_request, openai_error
from edgetune.serving.calls import Call, RouteSpec, new_id, total_usage
from edgetune.serving.conversation import (
    MAX_CHOICES,
    Conversation,
    Decoding,
    Delta,
    End,
    Text,
    Thought,
    TokenLogprob,
    TokenUsage,
    Tool,
    ToolCall,
    ToolChoice,
    text_parts,
)
from edgetune.serving.loaded_files import ModelUse, NamedModel
from edgetune.serving.replies import DONE, SSE, Event, Stream, TextTemplate
from edgetune.serving.request_fields import Fields
from edgetune.serving.sampling_fields import SamplingFields


class ContentPart(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Fields):
    """A function that was called."""

    name: str
    arguments: str = "{}"


class CallField(Fields):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Fields):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[CallField] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class FunctionField(Fields):
    """A function that may be called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Fields):
    """A tool."""

    type: Literal["function"]
    function: FunctionField


class NamedFunction(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Fields):
    """A schema of the answer."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class LoraWeight(Fields):
    """An adapter of the file, by its number in the order of --adapter, and its weight, as llama-server has them."""

    id: Annotated[int, Field(ge=0)]
    scale: float = 1.0


class StreamOptions(Fields):
    """What a stream contains."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


StopField = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None


class OpenAiFields(SamplingFields):
    """What the endpoints for chats and texts share. Fields of type Any have no effect on a local server."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopField = None
    lora: list[LoraWeight] | None = None
    user: Any = None

    def choose_adapters(self, model: ModelUse) -> ModelUse:
        """Return the model with the adapters of `lora`, in place of those that its name stands for."""
        if self.lora is None:
            return model
        known = model.file.adapters
        for index, each in enumerate(self.lora):
            if each.id >= len(known):
                raise bad_request(f"lora.{index}.id is {each.id}, but the file has {len(known)} adapters", "lora")
            if not math.isfinite(each.scale):
                raise bad_request(f"lora.{index}.scale is {each.scale}, which is not a weight", "lora")
        weights = {known[each.id].name: each.scale for each in self.lora}
        if len(weights) < len(self.lora):
            raise bad_request("lora names an adapter twice", "lora")
        return model.with_adapters(tuple(weights.items()))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(OpenAiFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: list[ToolField] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    verbosity: Any = None
    prediction: Any = None


_REFUSED = {"functions": "tools", "function_call": "tool_choice", "audio": None, "web_search_options": None}
"""Fields that would change the answer and cannot be honoured -> what to use."""


async def chat_completions(call: Call[ChatRequest]) -> Any:
    """Answer a conversation."""
    fields = call.fields
    _refuse(fields)
    model = fields.choose_adapters(await call.model(fields.model))
    sampling = fields.sampling(call.server.settings.sampling, model.runtime.vocabulary_size)
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    decoding = Decoding(sampling, limit, fields.stops, logprobs, fields.n or 1)
    _, deltas = await call.answer(model, _conversation(fields, model.runtime.chat_template), decoding)
    frame = {
        "id": new_id("chatcmpl-"), "created": call.created, "model": model.name,
        "system_fingerprint": call.fingerprint(model),
    }  # fmt: skip
    if fields.stream:
        events = _events(deltas, frame, decoding.choices, with_usage=fields.wants_usage)
        return Stream(events, SSE, stream_error)
    return await _whole(deltas, frame, decoding)


def _refuse(fields: ChatRequest) -> None:
    for name, instead in _REFUSED.items():
        if (fields.model_extra or {}).get(name) is not None:
            raise bad_request(f"{name} is not supported{f'; send {instead}' if instead else ''}", name)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")


def _conversation(fields: ChatRequest, template: Any) -> Conversation:
    form = fields.response_format
    schema: dict[str, Any] | None = None
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise bad_request("the field response_format.json_schema is missing", "response_format.json_schema")
        schema = form.json_schema.schema_
    elif form is not None and form.type == "json_object":
        schema = {"type": "object"}
    options = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None and template is not None and "reasoning_effort" in template.option_names:
        options.setdefault("reasoning_effort", fields.reasoning_effort)
    return Conversation(
        to_messages(fields.messages),
        tuple(
            Tool(each.function.name, each.function.description or "", each.function.parameters or {})
            for each in fields.tools or ()
        ),
        _tool_choice(fields.tool_choice),
        fields.parallel_tool_calls is not False,
        schema,
        "response_format.json_schema.schema" if form is not None and form.json_schema else "response_format",
        options,
    )


def _tool_choice(given: str | NamedTool | None) -> ToolChoice:
    if isinstance(given, NamedTool):
        return ToolChoice("required", given.function.name)
    return ToolChoice(given) if given else ToolChoice()  # type: ignore[arg-type]


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates read them: contents as text, results with the name of their tool.

    Raises:
        ApiError: A content is no text.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        given = message.refusal if message.content is None else message.content
        content = "".join(text_parts(given, f"messages.{index}.content"))
        each: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
        if message.tool_calls:
            each["tool_calls"] = [
                {
                    "id": called.id or "", "type": "function",
                    "function": {"name": called.function.name, "arguments": called.function.arguments},
                }
                for called in message.tool_calls
            ]  # fmt: skip
            names |= {called.id: called.function.name for called in message.tool_calls if called.id}
        if message.role == "tool":
            if message.tool_call_id:
                each["tool_call_id"] = message.tool_call_id
            name = message.name or names.get(message.tool_call_id or "")
            if name:
                each["name"] = name
        thought = message.reasoning_content or message.reasoning
        if thought is not None and message.role == "assistant":
            each["reasoning_content"] = thought
        found.append(each)
    return merge_system(found)


def merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the system messages at the beginning, of which most templates know one."""
    count = next((at for at, each in enumerate(messages) if each["role"] != "system"), len(messages))
    if count < 2:
        return messages
    joined = "\n\n".join(each["content"] for each in messages[:count])
    return [{"role": "system", "content": joined}, *messages[count:]]


# -- replies -----------------------------------------------------------------------------------------------------------


def usage_object(usage: TokenUsage) -> dict[str, Any]:
    """Return the usage as OpenAI's API writes it."""
    return {
        "prompt_tokens": usage.prompt, "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated, "prompt_tokens_details": {"cached_tokens": usage.cached},
    }  # fmt: skip


def stream_error(error: ApiError) -> list[Event]:
    """Return the last events of a stream that fails: clients raise the first one."""
    return [Event(openai_error(error)), DONE]


async def _events(
    deltas: AsyncIterator[tuple[int, Delta]], frame: dict[str, Any], choices: int, *, with_usage: bool
) -> AsyncIterator[Event]:
    base = {**frame, "object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def value(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**base, "choices": [choice]}

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> Event:
        return Event(value(index, delta, **more))

    def template(index: int, key: str) -> TextTemplate:
        return TextTemplate(lambda text: value(index, {key: text}))

    texts = [template(index, "content") for index in range(choices)]
    thoughts = [template(index, "reasoning_content") for index in range(choices)]
    ends: list[End] = []
    calls = [0] * choices
    for index in range(choices):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, delta in deltas:
        match delta:
            case Thought(text):
                yield Event(thoughts[index].fill(text))
            case Text(text, tokens) if tokens:
                yield chunk(index, {"content": text}, logprobs=_logprobs(tokens))
            case Text(text):
                yield Event(texts[index].fill(text))
            case ToolCall():
                yield chunk(index, {"tool_calls": [{"index": calls[index], **_call_object(delta)}]})
                calls[index] += 1
            case End():
                ends.append(delta)
                yield chunk(index, {}, finish_reason=delta.reason)
    if with_usage:
        yield Event({**base, "choices": [], "usage": usage_object(total_usage(ends))})
    yield DONE


async def _whole(deltas: AsyncIterator[tuple[int, Delta]], frame: dict[str, Any], decoding: Decoding) -> dict[str, Any]:
    pieces: list[list[Delta]] = [[] for _ in range(decoding.choices)]
    async for index, delta in deltas:
        pieces[index].append(delta)
    ends = [end for each in pieces for end in each if isinstance(end, End)]
    choices = [_choice(index, each, decoding) for index, each in enumerate(pieces)]
    return {**frame, "object": "chat.completion", "choices": choices, "usage": usage_object(total_usage(ends))}


def _choice(index: int, deltas: Sequence[Delta], decoding: Decoding) -> dict[str, Any]:
    text = "".join(each.text for each in deltas if isinstance(each, Text))
    thought = "".join(each.text for each in deltas if isinstance(each, Thought))
    calls = [_call_object(each) for each in deltas if isinstance(each, ToolCall)]
    tokens = [token for each in deltas if isinstance(each, Text) for token in each.tokens]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    logprobs = None if decoding.logprobs is None else _logprobs(tokens)
    end = deltas[-1]
    assert isinstance(end, End)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": end.reason}


def _call_object(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(each.raw, each.logprob), "top_logprobs": [_token(raw, logprob) for _, raw, logprob in each.top]}
            for each in tokens
        ],
        "refusal": None,
    }


def _token(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


# -- models ------------------------------------------------------------------------------------------------------------


async def list_models(call: Call[Fields]) -> Any:
    """List the files and their adapters. `models` is what Codex reads."""
    found = [_model_object(model) for model in call.server.pool.models.values()]
    return {"object": "list", "data": found, "models": [{"slug": each["id"], "name": each["id"]} for each in found]}


async def show_model(call: Call[Fields]) -> Any:
    """Show one file."""
    return _model_object(call.server.pool.find(call.path_parameters["name"]))


def _model_object(model: NamedModel) -> dict[str, Any]:
    """Return a model as OpenAI's API writes it; `parent` is the base of an adapter, as in vLLM."""
    parent = {"parent": model.file.name} if model.adapters else {}
    return {"id": model.name, "object": "model", "created": int(model.file.modified), "owned_by": "edgetune", **parent}


ROUTES = (
    RouteSpec("POST", "/v1/chat/completions", chat_completions, openai_error, ChatRequest),
    RouteSpec("GET", "/v1/models", list_models, openai_error),
    RouteSpec("GET", "/v1/models/{name:path}", show_model, openai_error),
)
