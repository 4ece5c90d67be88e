"""Rows of all kinds under the real templates: ids, labels and stop tokens are transformers', or the row is refused.

`refused_rows.json` is the table of refusals: template -> reason -> kinds of conversations. Nearly all of them are
refusals of the template itself, as in transformers: roles that do not alternate, no system message, one call at a time,
calls in a template without calls, and named templates that exist for tools only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.dataset import EncodedSplit, encode_all
from edgetune.data.formats import to_chat_row
from edgetune.data.objective_readers import reader_for
from edgetune.data.problems import RowProblem
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from tests.converters import vocabularies
from tests.data import test_real_templates
from tests.data.conversations import CONVERSATIONS
from tests.data.template_tokenizers import tokenizer_for
from tests.data.test_real_templates import TEMPLATES, ours, theirs

utils = test_real_templates.utils
TABLE: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "refused_rows.json").read_text(encoding="utf-8")
)
MAIN = ("two turns", "system", "white space around", "reasoning_content", "result", "call as text", "trailing question")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    vocabularies.byte_level(folder)
    return folder


def encoded(name: str, tokenizer: TextTokenizer, kind: str) -> EncodedSplit | str | None:
    """Return the encoded row, or why it is refused; None for what no template is asked for."""
    messages, tools = CONVERSATIONS[kind]
    try:
        row = to_chat_row({"messages": messages} | ({} if tools is None else {"tools": tools}))
    except RowProblem:
        return None
    try:
        return encode_all(ours(name), tokenizer, [row], 100_000)
    except DataError as error:
        return reason_of(error.message)


def reason_of(message: str) -> str:
    """Return a message without the parts that differ between conversations."""
    text = message.partition(": ")[2] if "refuses a conversation" in message else message
    if "maximum recursion depth" in text:  # the rest depends on where the stack ends
        return "maximum recursion depth exceeded"
    return re.sub(r"message \d+", "message N", text.partition(" has '")[0].partition(": ")[0])[:90]


def check_row(utils: Any, name: str, tokenizer: TextTokenizer, split: EncodedSplit) -> None:
    """Compare a row that is one text with transformers' rendering and the tokenizer's ids of it."""
    (chat,) = split.chats
    if len(chat.messages) < 2 or chat.messages[-2]["role"] == "assistant":
        return  # such an answer follows its own header (tests/cases/test_40_assistant_turns_in_a_row.py)
    prompt = theirs(utils, name, chat.messages[:-1], chat.tools, prompt=True)
    whole = theirs(utils, name, chat.messages, chat.tools)
    row = split.rows[-1]
    start = max(i for i in row.scored if not row.supervised[i - 1])
    trained = [i for i in row.scored if i >= start]
    assert row.input_ids[trained[-1]] in tokenizer.stop_ids
    if prompt is not None:
        given = tokenizer.encode(prompt)[0]
        assert row.input_ids[: len(given)] == given
        assert trained[0] == len(given)
    if whole is None or prompt is None or split.split or split.completed or not whole.startswith(prompt):
        return
    turn = tokenizer.decode([row.input_ids[i] for i in trained])
    assert whole[len(prompt) :].startswith(turn) or turn.startswith(whole[len(prompt) :])  # with the next role's marker
    expected = tokenizer.encode(whole)[0]
    if expected[: len(given)] == given:
        assert row.input_ids[: len(expected)] == expected


def check(utils: Any, name: str, kinds: Any, byte_level: Path) -> None:
    tokenizer = tokenizer_for(name, TEMPLATES[name], byte_level)
    refused = {kind: reason for reason, listed in TABLE.get(name, {}).items() for kind in listed}
    for kind in kinds:
        found = encoded(name, tokenizer, kind)
        if isinstance(found, EncodedSplit):
            assert kind not in refused
            check_row(utils, name, tokenizer, found)
        elif found is not None:
            assert (kind, found) == (kind, refused.get(kind))


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_of_a_real_template_are_those_of_transformers(utils: Any, name: str, byte_level: Path) -> None:
    check(utils, name, MAIN, byte_level)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_of_every_kind_are_those_of_transformers(utils: Any, name: str, byte_level: Path) -> None:
    check(utils, name, CONVERSATIONS, byte_level)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_of_a_real_template_begin_with_the_prompt_of_transformers(
    utils: Any, name: str, byte_level: Path
) -> None:
    tokenizer = tokenizer_for(name, TEMPLATES[name], byte_level)
    asked, answer = {"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "On."}
    for prompt in ([asked], [{**asked, "content": "Hi"}, answer, asked]):
        rows = reader_for("dpo", "auto").read_all({"messages": prompt, "chosen": "On.", "rejected": "Off, I think.\n"})
        context = [{**message, "weight": 0} if message is answer else message for message in prompt]
        try:
            for text in ("On.", "Off, I think.\n"):
                talk = to_chat_row({"messages": [*context, {**answer, "content": text}]})
                encode_all(ours(name), tokenizer, [talk], 100_000)
        except DataError as error:
            with pytest.raises(DataError, match=re.escape(error.message[:40])):
                encode_all(ours(name), tokenizer, list(rows), 100_000)
            continue
        (pair,) = encode_all(ours(name), tokenizer, list(rows), 100_000).pairs
        rendered = theirs(utils, name, prompt, None, prompt=True)
        assert rendered is not None
        assert pair.prompt_ids == tokenizer.encode(rendered)[0]
        assert pair.chosen.row.input_ids[: len(pair.prompt_ids)] == pair.rejected.prompt_ids
        assert {pair.chosen_ids[-1], pair.rejected_ids[-1]} <= tokenizer.ending_ids
        for ids, said in ((pair.chosen_ids, "On."), (pair.rejected_ids, "Off, I think.")):
            assert said in tokenizer.decode(ids)


def test_hardly_anything_usual_is_refused() -> None:
    """Only templates for tools alone, and one without a stop token, refuse a plain turn."""
    assert {name for name, reasons in TABLE.items() if any("one turn" in kinds for kinds in reasons.values())} == {
        "CohereForAI-c4ai-command-r-plus-tool_use", "llama-cpp-rwkv-world",
        "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    }  # fmt: skip
