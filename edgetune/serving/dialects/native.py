"""edgetune's own endpoints: tokens, templates, health and metrics. The bodies are those of llama-server and vLLM."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field

import edgetune
from edgetune.errors import EdgetuneError
from edgetune.serving.api_errors import bad_request, from_problem, openai_error
from edgetune.serving.calls import Call, RouteSpec
from edgetune.serving.conversation import Conversation, Tool
from edgetune.serving.dialects.openai_chat import ChatMessage, ToolField, to_messages
from edgetune.serving.prompting import render
from edgetune.serving.replies import Raw
from edgetune.serving.request_fields import Fields
from edgetune.serving.worker_threads import run_in_thread

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class TokenizeRequest(Fields):
    """The body of /tokenize: `content` of llama-server, or `prompt` of vLLM."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Fields):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class ApplyTemplateRequest(Fields):
    """The body of /apply-template."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ToolField] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def tokenize(call: Call[TokenizeRequest]) -> Any:
    """Return the token ids of a text; with `add_special` false, without BOS."""
    fields = call.fields
    name = "prompt" if fields.content is None else "content"
    text = fields.prompt if fields.content is None else fields.content
    if text is None:
        raise bad_request("the field content (or prompt) is missing", "content")
    runtime = (await call.model(fields.model)).runtime
    try:
        ids = await run_in_thread(runtime.tokenize, text)
    except EdgetuneError as problem:
        raise from_problem(problem, name) from None
    adds = fields.add_special if fields.add_special is not None else fields.add_special_tokens
    if adds is False and ids and ids[0] == runtime.bos_token and not text.startswith(_text(runtime, ids[0])):
        ids = ids[1:]
    tokens: list[Any] = ids
    if fields.with_pieces:
        tokens = [{"id": id_, "piece": _text(runtime, id_)} for id_ in ids]
    return {"tokens": tokens, "count": len(ids), "max_model_len": runtime.context}


def _text(runtime: Any, token: int) -> str:
    text: str = runtime.token_bytes(token, special=True).decode("utf-8", "replace")
    return text


async def detokenize(call: Call[DetokenizeRequest]) -> Any:
    """Return the text of token ids, with special tokens."""
    runtime = (await call.model(call.fields.model)).runtime
    for index, id_ in enumerate(call.fields.tokens):
        if id_ >= runtime.vocabulary_size:
            raise bad_request(
                f"tokens.{index}: {id_} is outside the vocabulary of {runtime.vocabulary_size}", f"tokens.{index}"
            )
    raw = b"".join(runtime.token_bytes(id_, special=True) for id_ in call.fields.tokens)
    text = raw.decode("utf-8", "replace")
    return {"content": text, "prompt": text}


async def apply_template(call: Call[ApplyTemplateRequest]) -> Any:
    """Return the text of the prompt of a conversation."""
    fields = call.fields
    model = await call.model(fields.model)
    tools = tuple(
        Tool(each.function.name, each.function.description or "", each.function.parameters or {})
        for each in fields.tools or ()
    )
    conversation = Conversation(
        to_messages(fields.messages), tools, template_options=fields.chat_template_kwargs or {}
    )  # fmt: skip
    return {"prompt": await run_in_thread(render, model.runtime, conversation)}


async def tokenizer_info(call: Call[Fields]) -> Any:
    """Return what lm-evaluation-harness asks of a remote tokenizer."""
    runtime = (await call.model(None)).runtime
    template = runtime.chat_template
    return {
        "tokenizer_class": "edgetune",
        "bos_token": None if runtime.bos_token is None else _text(runtime, runtime.bos_token),
        "eos_token": template.eos_token if template and template.eos_token else _first_stop(runtime),
        "pad_token": None,
        "chat_template": template.source if template else None,
        "model_max_length": runtime.context,
    }


def _first_stop(runtime: Any) -> str | None:
    known = [id_ for id_ in sorted(runtime.stop_tokens) if id_ < runtime.vocabulary_size]
    return _text(runtime, known[0]) if known else None


async def health(call: Call[Fields]) -> Any:
    """Say that the server answers, and which files are loaded."""
    server = call.server
    return {
        "status": "stopping" if server.is_draining else "ok",
        "version": edgetune.__version__,
        "uptime_seconds": round(time.time() - server.started, 3),
        "mode": "exact" if server.settings.is_exact else "batched",
        "loaded": [model.file.name for model in server.pool.loaded],
    }


async def root(call: Call[Fields]) -> Any:
    """Say that the server runs: clients of Ollama ask this first, and people open the address in a browser."""
    text = f"edgetune {edgetune.__version__} is running. OpenAI: /v1, Anthropic and Ollama: this address.\n"
    return Raw(text.encode(), "text/plain; charset=utf-8")


async def metrics(call: Call[Fields]) -> Any:
    """Return the counters for Prometheus."""
    return Raw(call.server.metrics.write(call.server.pool).encode(), _METRICS_TYPE)


ROUTES = (
    RouteSpec("POST", "/tokenize", tokenize, openai_error, TokenizeRequest),
    RouteSpec("POST", "/detokenize", detokenize, openai_error, DetokenizeRequest),
    RouteSpec("POST", "/apply-template", apply_template, openai_error, ApplyTemplateRequest),
    RouteSpec("GET", "/tokenizer_info", tokenizer_info, openai_error),
    RouteSpec("GET", "/", root, openai_error, is_open=True),
    RouteSpec("GET", "/health", health, openai_error, is_open=True),
    RouteSpec("GET", "/metrics", metrics, openai_error),
)
