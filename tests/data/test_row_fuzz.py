"""Random rows and damaged templates, from the file to token ids: an error with file and line, or transformers' ids.

Never a traceback, and nothing without a word: a key of a row is rendered, used or named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import EncodedSplit, encode_all
from edgetune.data.formats import ChatRow
from edgetune.data.masks import encode_conversation
from edgetune.data.problems import RowProblems
from edgetune.data.sources import read_source
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from edgetune.planning.golden_conversations import build_contract
from edgetune.planning.task_rows import greedy_prompts, prepare_task_rows
from tests.cases import rendering
from tests.converters import vocabularies
from tests.data import templates
from tests.data.schemes import CONTENTS, SCHEMES

TEMPLATES = {
    **{name: source for name, source in templates.RENDERED.items() if name != "features"},
    "tools": rendering.TOOLS_TEMPLATE,
    "reasoning": rendering.REASONING_TEMPLATE,
}
OF_NO_ROW = (
    "the chat template is not valid Jinja",
    "0 % of the tokens would be trained on",
    "100 % of the tokens would be trained on",
    "every row is cut at max_length",
    "is empty",
    "has no rows",
)
"""Beginnings or parts of messages that name no row, since it is not one row that is wrong."""

HALVES = st.sampled_from(["\ud83d", "\udca1 x", "\ud83d\udca1", "a\x00b", "\x85\u2028", "\ufeffx"])
TEXTS = CONTENTS | HALVES
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.integers(-(10**30), 10**30) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "User", "developer", "function_call",
                         "observation", "narrator", "", "ASSISTANT", "model"])  # fmt: skip
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "input_text", "image_url", "thinking", "audio", None]) | VALUES},
        optional={"text": TEXTS | VALUES, "value": TEXTS, "thinking": TEXTS},
    )
    | TEXTS,
    max_size=2,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS | VALUES, "arguments": VALUES})},
        optional={"id": TEXTS, "type": st.just("function")},
    ),
    max_size=2,
)
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES | VALUES, "content": TEXTS | PARTS | VALUES},
    optional={
        "tool_calls": CALLS | VALUES,
        "name": VALUES,
        "tool_call_id": TEXTS,
        "reasoning_content": TEXTS | VALUES,
        "thinking": VALUES,
        "weight": st.sampled_from([0, 1, True, 0.5, "no", None]),
        "train": VALUES,
        "images": VALUES,
        "zz_unknown": VALUES,
    },
)
GOOD = st.builds(
    lambda question, answer: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    TEXTS, TEXTS,
)  # fmt: skip
TALKS = st.builds(lambda messages, end: [*messages, *end], st.lists(MESSAGES, max_size=4), GOOD | st.just([]))
EXTRAS: dict[str, Any] = {
    "tools": CALLS | VALUES,
    "weight": VALUES,
    "label": VALUES,
    "images": VALUES,
    "system": TEXTS | VALUES,
    "chosen": VALUES,
    "id": VALUES,
    "chat_template_kwargs": VALUES,
    "zz_unknown": VALUES,
}
SHAREGPT = st.fixed_dictionaries({"from": ROLES | VALUES, "value": TEXTS | VALUES})
ROWS = (
    st.fixed_dictionaries({"messages": TALKS | GOOD | VALUES}, optional=EXTRAS)
    | st.fixed_dictionaries({"prompt": TEXTS | GOOD | VALUES, "completion": TEXTS | VALUES}, optional=EXTRAS)
    | st.fixed_dictionaries({"instruction": TEXTS | VALUES, "output": TEXTS | VALUES},
                            optional={**EXTRAS, "input": VALUES, "history": VALUES})
    | st.fixed_dictionaries({"conversations": st.lists(SHAREGPT, max_size=3)}, optional=EXTRAS)
    | VALUES
)  # fmt: skip


SOUND_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "assistant"]), "content": CONTENTS},
    optional={
        "name": CONTENTS,
        "reasoning_content": CONTENTS,
        "train": st.booleans(),
        "zz_unknown": st.integers(0, 3) | CONTENTS,
    },
)
SOUND_ROWS = st.fixed_dictionaries(
    {
        "messages": st.builds(
            lambda messages, question, answer: [
                *messages,
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            st.lists(SOUND_MESSAGES, max_size=4),
            CONTENTS,
            CONTENTS,
        )
    },
    optional={"zz_unknown": st.integers() | CONTENTS, "weight": st.sampled_from([0, 1])},
)


@st.composite
def nearly_sound(draw: st.DrawFn) -> Any:
    """Return a sound row, or one in which a value of the row or of a message is another."""
    row = json.loads(json.dumps(draw(SOUND_ROWS)))
    if draw(st.integers(0, 3)) == 0:
        holder = draw(st.sampled_from([row, *row["messages"]]))
        holder[draw(st.sampled_from([*holder, "tool_calls", "content"]))] = draw(VALUES | PARTS | CALLS)
    return row


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Return a template with a part removed, doubled or replaced."""
    source = draw(st.sampled_from(sorted(TEMPLATES.values())) | SCHEMES.map(lambda scheme: scheme.jinja()))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(source)))
        length = draw(st.integers(0, 30))
        part = draw(st.sampled_from(["", "{{ x.y.z }}", "{% if", "%}", "}}", "{{ messages[0].content.nope() }}", "\x00",
                                     "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% endfor %}", "|tojson", "+ 1",
                                     "messages", "loop.last", "{{ tools[0] }}", "\n", "|trim", "not "]))  # fmt: skip
        source = source[:start] + part + source[start + length :]
    return source


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    vocabularies.byte_level(folder)
    return TextTokenizer.from_directory(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


SOURCES = st.sampled_from(sorted(TEMPLATES.values()))


@settings(deadline=None)
@given(
    rows=st.lists(nearly_sound(), min_size=1, max_size=2) | st.lists(ROWS | nearly_sound(), min_size=1, max_size=3),
    source=SOURCES | damaged(),
)
def test_rows_are_refused_with_file_and_line_or_have_the_ids_of_transformers(
    pair: tuple[TextTokenizer, Any], folder: Path, rows: list[Any], source: str
) -> None:
    template = ChatTemplate(source, "<|endoftext|>", "<|im_end|>")
    path = rendering.write_jsonl(folder / "rows.jsonl", rows)
    encoding = _encode(path, template, pair[0], "rows.jsonl, line ")
    if encoding is None:
        event("refused")
        return
    event("encoded")
    assert len(encoding.chats) == len(rows)
    for row in encoding.chats:
        _check_row(pair, template, row)
    _check_keys(rows, encoding)
    _ask_what_capture_asks(template, pair[0], encoding.chats)


def _ask_what_capture_asks(template: ChatTemplate, tokenizer: TextTokenizer, rows: Sequence[ChatRow]) -> None:
    """Rows that can be trained on are test rows, or problems with file and line; golden conversations never fail."""
    problems = RowProblems()
    for kind in ("exact", "json", "number", "choice"):
        data = DataConfig.model_construct(answer=kind, choices=["a", " red", "\n"])
        prepare_task_rows(template, tokenizer, rows, data, 3, problems)
    greedy_prompts(template, tokenizer, rows, problems)
    assert all(line.startswith("rows.jsonl, line ") for line in problems.rows)
    build_contract(template, tokenizer, rows)


def _encode(path: str, template: ChatTemplate, tokenizer: TextTokenizer, place: str) -> EncodedSplit | None:
    """Read and encode rows; None if they are refused in a message that names the place."""
    message = ""
    try:
        return encode_all(template, tokenizer, read_source(path).rows, 4096)
    except DataError as error:
        message = error.message
    assert place in message or any(part in message for part in OF_NO_ROW), message
    return None


def _check_row(pair: tuple[TextTokenizer, Any], template: ChatTemplate, row: ChatRow) -> None:
    """The ids of an encoded row are those of transformers, or begin with those of its prompt."""
    tokenizer, theirs = pair
    if not row.answers:
        return
    options = template.with_options(row.options)
    single = encode_conversation(options, tokenizer, row.messages, tools=row.tools, untrained=row.untrained)
    named = {"bos_token": template.bos_token, "eos_token": template.eos_token, **row.options}
    (text,), _ = chat_template_utils.render_jinja_template(
        [row.messages], tools=row.tools, chat_template=template.source, **named
    )
    whole = theirs(text, add_special_tokens=False)["input_ids"]
    last = single.rows[-1]
    if len(single.rows) == 1 and last.input_ids == whole:
        return
    try:
        (asked,), _ = chat_template_utils.render_jinja_template(
            [row.messages[: row.answers[-1]]], tools=row.tools, chat_template=template.source,
            add_generation_prompt=True, **named,
        )  # fmt: skip
    except Exception:  # noqa: BLE001 - whatever a template raises for a conversation of no messages
        return
    prompt = theirs(asked, add_special_tokens=False)["input_ids"]
    follows = row.answers[-1] == 0 or row.messages[row.answers[-1] - 1]["role"] == "assistant"
    assert follows or last.input_ids[: len(prompt)] == prompt
    assert text.startswith(tokenizer.decode(last.input_ids).rstrip()) or len(single.rows) > 1


def _check_keys(rows: list[Any], encoding: EncodedSplit) -> None:
    """A key that nobody knows is named, unless its value stands for an absent one."""
    said = "\n".join(encoding.usage.describe())
    for row in rows:
        messages = row.get("messages") if isinstance(row, dict) else None
        holders = [row, *(m for m in messages if isinstance(m, dict))] if isinstance(messages, list) else [row]
        if any(isinstance(each, dict) and each.get("zz_unknown") not in (None, "", [], {}) for each in holders[:1]):
            assert "zz_unknown" in said


@settings(deadline=None)
@given(lines=st.lists(st.binary(max_size=40) | ROWS.map(lambda row: json.dumps(row).encode()[:-1]), max_size=4))
def test_bytes_that_are_no_rows_are_refused_with_file_and_line(
    pair: tuple[TextTokenizer, Any], folder: Path, lines: list[bytes]
) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    _encode(str(path), ChatTemplate(templates.CHATML), pair[0], "rows.jsonl")
