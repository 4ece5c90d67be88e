"""From a conversation to the token ids of its prompt, and what is needed to read the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgetune.data.answer_frame import NO_FRAME, AnswerFrame
from edgetune.data.chat import ChatTemplate
from edgetune.errors import EdgetuneError
from edgetune.runtime.generation_request import Grammar
from edgetune.runtime.interface import NoChatTemplate, Runtime
from edgetune.serving.api_errors import bad_request, from_problem
from edgetune.serving.conversation import Conversation, Tool
from edgetune.serving.json_schemas import compile_schema
from edgetune.serving.safe_validation import SafeValidator
from edgetune.serving.tool_calls import HERMES, Syntax, Toolbox, call_schema, find_syntax

_TOOL_PROMPT = (
    "You may call functions to help with the user's request. Their signatures, as JSON schemas:\n<tools>\n{tools}\n"
    "</tools>\n\nFor each call, write a JSON object with the name and the arguments within tags:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <object>}}\n</tool_call>'
)
"""For a template that does not describe tools, as Hermes describes them."""


@dataclass(frozen=True)
class PreparedAnswer:
    """A prompt, and how the answer to it is read.

    Attributes:
        ids: Token ids of the prompt.
        frame: What the template writes around the answer.
        toolbox: The tools that may be called; None: the answer is text alone.
        forced: Syntax of the call that the prompt has begun already.
        has_one_call: Whether the answer ends with its first call.
        grammar: What the answer must match.
        grammar_field: Name of the request field with its schema.
        validator: Schema of the answer, by which it is checked at its end.
    """

    ids: list[int]
    frame: AnswerFrame = NO_FRAME
    toolbox: Toolbox | None = None
    forced: Syntax | None = None
    has_one_call: bool = False
    grammar: Grammar | None = None
    grammar_field: str | None = None
    validator: SafeValidator | None = None


def render(runtime: Runtime, conversation: Conversation) -> str:
    """Return the text of the prompt of a conversation, up to where the model goes on."""
    return _Rendering(runtime, conversation).text


def prepare(runtime: Runtime, conversation: Conversation) -> PreparedAnswer:
    """Render and tokenize a conversation.

    Raises:
        ApiError: The template refuses it, a schema is not valid, or the text cannot be tokenized; with the field.
    """
    rendering = _Rendering(runtime, conversation)
    tools = conversation.callable_tools
    toolbox = Toolbox(tools, [f"tools.{conversation.tools.index(tool)}" for tool in tools]) if tools else None
    validator = grammar = None
    if conversation.schema is not None:
        if tools:
            raise bad_request(
                f"{conversation.schema_field} cannot be combined with tools: a call would not match the schema; send "
                "tool_choice none, or leave out one of them",
                conversation.schema_field,
            )
        validator = compile_schema(conversation.schema, conversation.schema_field)
        grammar = Grammar.json_schema(json.dumps(conversation.schema))
    elif rendering.forced is not None:
        schema = call_schema(tools, rendering.forced, parallel=conversation.parallel_tool_calls)
        grammar = Grammar.json_schema(json.dumps(schema))
    try:
        ids = runtime.tokenize(rendering.text)
    except EdgetuneError as problem:
        raise from_problem(problem, conversation.messages_field) from None
    return PreparedAnswer(
        ids,
        rendering.frame,
        toolbox,
        rendering.forced,
        not conversation.parallel_tool_calls,
        grammar,
        "tools" if conversation.schema is None else conversation.schema_field,
        validator,
    )


class _Rendering:
    """The text of a prompt, the frame of the answer to it, and the call that it begins."""

    def __init__(self, runtime: Runtime, conversation: Conversation) -> None:
        template = _template(runtime, conversation)
        messages = [_for_template(message) for message in conversation.messages]
        if not messages:
            raise bad_request("there are no messages", conversation.messages_field)
        prefill = _take_prefill(messages)
        tools = conversation.callable_tools
        described: Sequence[Mapping[str, Any]] | None = [tool.for_template() for tool in tools] or None
        if described and not _reads_tools(template):
            messages, described = _with_tool_prompt(messages, tools), None
        try:
            prompt = template.render(messages, add_generation_prompt=True, tools=described)
            frame = runtime.answer_frame(messages, tools=described, template_options=conversation.template_options)
        except EdgetuneError as problem:
            raise from_problem(problem, conversation.messages_field) from None
        is_forced = conversation.tool_choice.mode == "required" and bool(tools)
        self.forced = find_syntax(template.source_for(described)) if is_forced and described else None
        if is_forced and self.forced is None:
            self.forced = HERMES
        self.text, self.frame = prompt, frame
        if self.forced is None and conversation.schema is None and prefill is None:
            return
        self.text += _skip_reasoning(frame)
        self.frame = AnswerFrame(suffix=frame.suffix)
        if prefill is not None:
            self.text += prefill
        if self.forced is not None:
            self.text += self.forced.force
            self.frame = NO_FRAME


def _template(runtime: Runtime, conversation: Conversation) -> ChatTemplate:
    template, options = runtime.chat_template, conversation.template_options
    if template is None:
        raise bad_request(
            f"{NoChatTemplate.__doc__} Use /v1/completions for plain text, or export with a template",
            conversation.messages_field,
        )
    try:
        template.check_options(options)
    except EdgetuneError as problem:
        raise from_problem(problem, "chat_template_kwargs") from None
    return template.with_options(options)


def _take_prefill(messages: list[dict[str, Any]]) -> str | None:
    """Remove the beginning of the answer that the request gives, the last message of the assistant; return it."""
    last = messages[-1]
    if last.get("role") != "assistant" or last.get("tool_calls") or not last.get("content"):
        return None
    messages.pop()
    return str(last["content"])


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as objects, which templates write as JSON themselves."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [{**call, "function": _with_object(call["function"])} for call in calls]}


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    return {**function, "arguments": arguments}


def _reads_tools(template: ChatTemplate) -> bool:
    return template.tool_use is not None or "tools" in template.source


def _with_tool_prompt(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Describe the tools in the system message."""
    lines = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)
    prompt = _TOOL_PROMPT.format(tools=lines)
    if messages and messages[0].get("role") == "system":  # none are left of a request that is a prefill alone
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{prompt}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def _skip_reasoning(frame: AnswerFrame) -> str:
    """Return what comes between the prompt and an answer without reasoning."""
    if frame.is_opened and frame.mark[0] not in frame.prefix:
        return frame.closing
    return frame.given
