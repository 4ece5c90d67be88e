"""Ollama's API, read-only: version, tags, show, ps, chat, generate, embed. Streams are lines of JSON."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from gguf import LlamaFileType
from pydantic import Field

import edgetune
from edgetune.errors import EdgetuneError
from edgetune.runtime.text import Utf8Stream
from edgetune.serving.answers import cancel_all, finish_reason, read_events, submit, usage_of
from edgetune.serving.api_errors import ApiError, bad_request, ollama_error
from edgetune.serving.calls import Call, RouteSpec
from edgetune.serving.conversation import Conversation, Decoding, Delta, End, Text, Thought, TokenUsage, Tool, ToolCall
from edgetune.serving.dialects.openai_chat import ToolField, merge_system
from edgetune.serving.embedding import embed_inputs
from edgetune.serving.loaded_files import Identity, ModelUse, NamedModel, ServedFile
from edgetune.serving.prompting import PreparedAnswer
from edgetune.serving.replies import NDJSON, Event, Stream
from edgetune.serving.request_fields import Fields
from edgetune.serving.sampling_fields import SamplingFields
from edgetune.serving.worker_threads import run_in_thread
from edgetune_converters.gguf import reader


class OllamaOptions(SamplingFields):
    """Options of a request. Those of type Any are chosen when the server starts, or have no effect."""

    num_predict: Annotated[int, Field(ge=-2, lt=2**31)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | str | None = None
    num_ctx: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    num_thread: Any = None
    num_keep: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    embedding_only: Any = None
    penalize_newline: Any = None


class OllamaFunction(Fields):
    """A function that was called."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: Any = None


class OllamaCall(Fields):
    """A call in a message of the assistant."""

    function: OllamaFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(Fields):
    """A message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaFields(Fields):
    """What chat and generate share."""

    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    keep_alive: Any = None


class OllamaChatRequest(OllamaFields):
    """The body of /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[ToolField] | None = None


class GenerateRequest(OllamaFields):
    """The body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None


class EmbedRequest(Fields):
    """The body of /api/embed."""

    model: str | None = None
    input: str | Annotated[list[str], Field(max_length=2048)]
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    options: OllamaOptions | None = None
    keep_alive: Any = None


class OllamaEmbeddingRequest(Fields):
    """The body of /api/embeddings, which /api/embed has replaced."""

    model: str | None = None
    prompt: str
    options: OllamaOptions | None = None
    keep_alive: Any = None


class ShowRequest(Fields):
    """The body of /api/show."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


# -- answers -----------------------------------------------------------------------------------------------------------


async def chat(call: Call[OllamaChatRequest]) -> Any:
    """Answer a conversation."""
    fields = call.fields
    clock = _Clock()
    model = await call.model(fields.model)
    clock.note_loaded()
    if not fields.messages:
        return _loaded(model, {"message": {"role": "assistant", "content": ""}})
    conversation = Conversation(
        _messages(fields.messages),
        tuple(
            Tool(each.function.name, each.function.description or "", each.function.parameters or {})
            for each in fields.tools or ()
        ),
        schema=_schema(fields.format),
        schema_field="format",
        template_options=_think_options(fields.think, model),
    )
    return await _reply(call, model, conversation, _chat_piece, clock)


async def generate(call: Call[GenerateRequest]) -> Any:
    """Answer one prompt; with `raw`, continue its text."""
    fields = call.fields
    _refuse(fields)
    clock = _Clock()
    model = await call.model(fields.model)
    clock.note_loaded()
    if not fields.prompt:
        return _loaded(model, {"response": ""})
    if fields.raw:
        events = _raw_pieces(call, model, clock)
        return Stream(events, NDJSON, _stream_error) if fields.stream is not False else await _join(events, "response")
    before = [] if fields.system is None else [{"role": "system", "content": fields.system}]
    conversation = Conversation(
        [*before, {"role": "user", "content": fields.prompt}],
        schema=_schema(fields.format),
        schema_field="format",
        template_options=_think_options(fields.think, model),
        messages_field="prompt",
    )
    return await _reply(call, model, conversation, _generate_piece, clock)


def _refuse(fields: GenerateRequest) -> None:
    for name in ("images", "suffix", "template", "context"):
        if getattr(fields, name):
            raise bad_request(f"{name} is not supported", name)
    if fields.raw and (fields.system is not None or fields.format):
        raise bad_request("raw applies no template, so system and format have no place", "raw")


async def _reply(
    call: Call[Any], model: ModelUse, conversation: Conversation, piece: Any, clock: _Clock
) -> Any:  # fmt: skip
    fields: OllamaFields = call.fields
    _, deltas = await call.answer(model, conversation, _decoding(call, model))
    events = _events(deltas, model, piece, clock)
    if fields.stream is not False:
        return Stream(events, NDJSON, _stream_error)
    return await _join(events, "message" if piece is _chat_piece else "response")


def _decoding(call: Call[Any], model: ModelUse) -> Decoding:
    options = call.fields.options or OllamaOptions()
    limit = options.num_predict
    stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    return Decoding(
        options.sampling(call.server.settings.sampling, model.runtime.vocabulary_size, "options."),
        None if limit is None or limit < 0 else limit,
        tuple(each for each in stop if each),
    )


def _messages(given: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, message in enumerate(given):
        if message.images:
            raise bad_request(f"messages.{index}.images: the model reads text only", f"messages.{index}.images")
        each: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            each["tool_calls"] = [
                {
                    "id": made.id or "", "type": "function",
                    "function": {"name": made.function.name, "arguments": json.dumps(made.function.arguments)},
                }
                for made in message.tool_calls
            ]  # fmt: skip
        if message.thinking is not None:
            each["reasoning_content"] = message.thinking
        if message.tool_name is not None:
            each["name"] = message.tool_name
        if message.tool_call_id is not None:
            each["tool_call_id"] = message.tool_call_id
        found.append(each)
    return merge_system(found)


def _schema(form: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(form, str):
        if form not in ("", "json"):
            raise bad_request(f"format is {form!r}; send json or a JSON schema", "format")
        return {"type": "object"} if form else None
    return form


def _think_options(think: bool | str | None, model: ModelUse) -> dict[str, Any]:
    template = model.runtime.chat_template
    names = template.option_names if template else ()
    if isinstance(think, str) and "reasoning_effort" in names:
        return {"reasoning_effort": think}
    return {"enable_thinking": bool(think)} if think is not None and "enable_thinking" in names else {}


class _Clock:
    """How long a request has taken, in nanoseconds."""

    def __init__(self) -> None:
        self._started = self._loaded = time.monotonic_ns()
        self._first: int | None = None

    def note_loaded(self) -> None:
        self._loaded = time.monotonic_ns()

    def note_token(self) -> None:
        if self._first is None:
            self._first = time.monotonic_ns()

    def durations(self, usage: TokenUsage) -> dict[str, int]:
        now = time.monotonic_ns()
        first = now if self._first is None else self._first
        return {
            "total_duration": now - self._started, "load_duration": self._loaded - self._started,
            "prompt_eval_count": usage.prompt, "prompt_eval_duration": first - self._loaded,
            "eval_count": usage.generated, "eval_duration": now - first,
        }  # fmt: skip


def _chat_piece(delta: Delta | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    match delta:
        case Text(text):
            message["content"] = text
        case Thought(text):
            message["thinking"] = text
        case ToolCall():
            message["tool_calls"] = [{"function": {"name": delta.name, "arguments": json.loads(delta.arguments)}}]
    return {"message": message}


def _generate_piece(delta: Delta | None) -> dict[str, Any]:
    match delta:
        case Text(text):
            return {"response": text}
        case Thought(text):
            return {"response": "", "thinking": text}
    return {"response": ""}


async def _events(
    deltas: AsyncIterator[tuple[int, Delta]], model: ModelUse, piece: Any, clock: _Clock
) -> AsyncIterator[Event]:
    async for _, delta in deltas:
        clock.note_token()
        if isinstance(delta, End):
            reason = "length" if delta.reason == "length" else "stop"
            yield Event({**_head(model), **piece(None), **_done(reason, clock, delta.usage)})
        elif not isinstance(delta, Text) or delta.text:
            yield Event({**_head(model), **piece(delta), "done": False})


async def _raw_pieces(call: Call[GenerateRequest], model: ModelUse, clock: _Clock) -> AsyncIterator[Event]:
    decoding = _decoding(call, model)
    ids = await run_in_thread(model.runtime.tokenize, call.fields.prompt or "")
    (ticket,) = await run_in_thread(
        submit, model, PreparedAnswer(ids), decoding, decoding.stop, "prompt", discard=cancel_all
    )
    call.resources.callback(ticket.cancel)
    stream = Utf8Stream()
    async for event in read_events(ticket):
        clock.note_token()
        if text := stream.feed(event.bytes_):
            yield Event({**_head(model), "response": text, "done": False})
    reason = finish_reason(ticket)
    call.server.metrics.count_tokens(usage_of(ticket))
    yield Event({**_head(model), "response": stream.finish(), **_done(reason, clock, usage_of(ticket))})


def _head(model: ModelUse) -> dict[str, Any]:
    return {"model": model.name, "created_at": _now()}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _done(reason: str, clock: _Clock, usage: TokenUsage) -> dict[str, Any]:
    return {"done": True, "done_reason": reason, **clock.durations(usage)}


def _loaded(model: ModelUse, content: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request without a prompt, which loads the file."""
    return {**_head(model), **content, "done": True, "done_reason": "load"}


async def _join(events: AsyncIterator[Event], key: str) -> dict[str, Any]:
    """Return a stream as one object."""
    whole: dict[str, Any] = {}
    texts: dict[str, str] = {}
    calls: list[Any] = []
    async for event in events:
        whole = event.data
        content = whole["message"] if key == "message" else whole
        calls += content.get("tool_calls", [])
        for name in ("content", "thinking", "response"):
            texts[name] = texts.get(name, "") + content.get(name, "")
    if key == "response":
        return {**whole, "response": texts["response"]} | ({"thinking": texts["thinking"]} if texts["thinking"] else {})
    message = {"role": "assistant", "content": texts["content"]}
    more = ({"thinking": texts["thinking"]} if texts["thinking"] else {}) | ({"tool_calls": calls} if calls else {})
    return {**whole, "message": message | more}


def _stream_error(error: ApiError) -> list[Event]:
    return [Event(ollama_error(error))]


async def embed(call: Call[EmbedRequest]) -> Any:
    """Return the embeddings of texts."""
    fields = call.fields
    clock = _Clock()
    model = await call.model(fields.model)
    clock.note_loaded()
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    vectors, tokens = await embed_inputs(call, model, texts, fields.dimensions, cut=fields.truncate is not False)
    durations = clock.durations(TokenUsage(tokens))
    return {
        "model": model.name, "embeddings": [vector.tolist() for vector in vectors],
        **{key: durations[key] for key in ("total_duration", "load_duration", "prompt_eval_count")},
    }  # fmt: skip


async def embed_prompt(call: Call[OllamaEmbeddingRequest]) -> Any:
    """Return the embedding of one text."""
    model = await call.model(call.fields.model)
    (vector,), _ = await embed_inputs(call, model, [call.fields.prompt], None, cut=True)
    return {"embedding": vector.tolist()}


# -- files -------------------------------------------------------------------------------------------------------------


async def version(call: Call[Fields]) -> Any:
    """Return the version. Clients compare it with that of Ollama, so it is one that they accept."""
    return {"version": "0.13.0", "edgetune": edgetune.__version__}


async def tags(call: Call[Fields]) -> Any:
    """List the files and their adapters."""
    return {"models": [await asyncio.to_thread(_model, model) for model in call.server.pool.models.values()]}


async def running(call: Call[Fields]) -> Any:
    """List the loaded files."""
    return {
        "models": [
            {
                **await asyncio.to_thread(_model, call.server.pool.find(model.file.name)), "size_vram": 0,
                "expires_at": "9999-12-31T23:59:59Z", "context_length": model.runtime.context,
            }
            for model in call.server.pool.loaded
        ]
    }  # fmt: skip


async def show(call: Call[ShowRequest]) -> Any:
    """Show a file: what its metadata say, and what it can do."""
    fields = call.fields
    model = await call.model(fields.model or fields.name)
    runtime = model.runtime
    template = runtime.chat_template
    capabilities = ["completion"]
    if template is not None and ("tools" in template.source or template.tool_use):
        capabilities.append("tools")
    if template is not None and "</think>" in template.source:
        capabilities.append("thinking")
    architecture = str(runtime.metadata.get("general.architecture", ""))
    known = {key: value for key, value in runtime.metadata.items() if isinstance(value, str | int | float | bool)}
    stops = "\n".join(f"stop {json.dumps(text)}" for text in sorted(runtime.stop_texts))
    return {
        "modified_at": _time(model.file.modified),
        "template": template.source if template else "",
        "parameters": stops,
        "details": _details(model.file),
        "model_info": {**known, f"{architecture}.context_length": runtime.trained_context},
        "capabilities": capabilities,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _model(model: NamedModel) -> dict[str, Any]:
    file, name = model.file, model.name if model.adapters else f"{model.name}:latest"
    details = _details(file) | ({"parent_model": file.name} if model.adapters else {})
    return {
        "name": name, "model": name, "modified_at": _time(file.modified), "size": file.size(),
        "digest": model.digest(), "details": details,
    }  # fmt: skip


def _details(file: ServedFile) -> dict[str, Any]:
    try:
        family, size, level = _header(file.path, file.identity()) if file.format == "gguf" else ("", "", "")
    except (EdgetuneError, OSError):
        family, size, level = "", "", ""  # damaged or removed: its requests say so
    return {
        "parent_model": "", "format": file.format, "family": family, "families": [family] if family else [],
        "parameter_size": size, "quantization_level": level,
    }  # fmt: skip


@lru_cache(64)
def _header(path: Path, identity: Identity) -> tuple[str, str, str]:
    """Return architecture, number of parameters and storage type of a GGUF file, as Ollama writes them."""
    file = reader.read(path)
    count = float(sum(math.prod(tensor.shape) for tensor in file.tensors))
    exponent = min(3, int(math.log10(max(count, 1)) // 3))
    kind = file.metadata.get("general.file_type")
    level = LlamaFileType(kind).name.split("_", 1)[1] if kind in set(LlamaFileType) else ""
    return (
        str(file.metadata.get("general.architecture", "")),
        f"{count / 1000**exponent:.3g}{('', 'K', 'M', 'B')[exponent]}",
        level,
    )


async def refuse(call: Call[Fields]) -> Any:
    """Refuse what would change files."""
    raise ApiError(403, "this server only answers: files are named when it is started (edgetune serve FILE...)")


ROUTES = (
    RouteSpec("GET", "/api/version", version, ollama_error),
    RouteSpec("GET", "/api/tags", tags, ollama_error),
    RouteSpec("GET", "/api/ps", running, ollama_error),
    RouteSpec("POST", "/api/show", show, ollama_error, ShowRequest),
    RouteSpec("POST", "/api/chat", chat, ollama_error, OllamaChatRequest),
    RouteSpec("POST", "/api/generate", generate, ollama_error, GenerateRequest),
    RouteSpec("POST", "/api/embed", embed, ollama_error, EmbedRequest),
    RouteSpec("POST", "/api/embeddings", embed_prompt, ollama_error, OllamaEmbeddingRequest),
    *(RouteSpec("POST", f"/api/{name}", refuse, ollama_error) for name in ("pull", "push", "create", "copy")),
    RouteSpec("DELETE", "/api/delete", refuse, ollama_error),
)
