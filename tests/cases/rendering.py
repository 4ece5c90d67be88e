"""Rows from a file to their picture: the text with what is trained on in brackets, and transformers' own rendering."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import EncodedSplit, encode_all
from edgetune.data.objective_readers import reader_for
from edgetune.data.preview import highlight_row
from edgetune.data.sources import read_source
from edgetune.data.text_tokenizer import TextTokenizer
from tests.converters import vocabularies
from tests.data import templates

TOOLS_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\nYou may call these functions:\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}"
    "{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for call in message.tool_calls %}{%- set call = call.function if call.function is defined else call %}"
    "{{- '\n<call>' + call.name + ' ' + "
    "(call.arguments if call.arguments is string else call.arguments | tojson) + '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}{{- '<|im_start|>tool' }}"
    "{%- if message.name %}{{- ' ' + message.name }}{%- endif %}"
    "{%- if message.tool_call_id %}{{- ' ' + message.tool_call_id }}{%- endif %}"
    "{{- '\n' + message.content + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
REASONING_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- set thought = message.reasoning_content or message.thinking or '' %}"
    "{%- if message.role == 'assistant' and thought %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    """Write one row per line; texts become ASCII with escapes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tokenizer_in(folder: Path) -> TextTokenizer:
    """Make a byte-level tokenizer in `folder`."""
    folder.mkdir(exist_ok=True)
    vocabularies.byte_level(folder)
    return TextTokenizer.from_directory(folder)


def encode(
    folder: Path, rows: Sequence[Any], template: str = templates.CHATML, objective: str = "sft", length: int = 4096
) -> EncodedSplit:
    """Write rows to rows.jsonl, read and encode them for an objective."""
    reader = reader_for(objective, "auto")
    source = read_source(write_jsonl(folder / "rows.jsonl", rows), reader=reader)
    return encode_all(ChatTemplate(template), tokenizer_in(folder / "base"), source.rows, length)


def pictures(folder: Path, rows: Sequence[Any], template: str = templates.CHATML) -> list[str]:
    """Return each row as text, with what is trained on in ⟦brackets⟧."""
    encoding = encode(folder, rows, template)
    tokenizer = tokenizer_in(folder / "base")
    return [highlight_row(row, tokenizer, color=False).plain for row in encoding.rows]


def transformers_picture(row: Any, template: str) -> str:
    """Return the same picture from transformers' rendering of prefixes; the end of a turn is its last special token."""
    utils: Any = pytest.importorskip("transformers.utils.chat_template_utils")

    def render(part: list[dict[str, Any]], prompt: bool = False) -> str:
        tools = row.get("tools")
        (text,), _ = utils.render_jinja_template(
            [part], tools=json.loads(tools) if isinstance(tools, str) else tools, chat_template=template,
            add_generation_prompt=prompt,
        )  # fmt: skip
        return str(text)

    messages, result, done = row["messages"], "", 0
    whole = render(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = len(render(messages[:index], True)), len(render(messages[: index + 1]).rstrip())
            result += whole[done:start] + "⟦" + whole[start:end] + "⟧"
            done = end
    return result + whole[done:]
