"""Contents as lists of parts give the rows of the plain texts, or are refused by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import DataError
from tests.cases.rendering import REASONING_TEMPLATE, encode, pictures

QUESTION, ANSWER = "Is the lamp on?", "The lamp is on."


def _row(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ([{"type": "text", "value": QUESTION}], [{"type": "text", "value": ANSWER}]),
        ([{"type": "text", "text": QUESTION, "image_url": None}], [{"type": "text", "text": ANSWER}]),
        ([{"type": "input_text", "text": QUESTION}], [{"type": "output_text", "text": ANSWER}]),
        ([{"type": "text", "content": QUESTION}], [{"type": "text", "content": ANSWER}]),
        (["Is the ", {"type": "text", "text": "lamp on?"}], ["The lamp ", {"text": "is on."}]),
    ],
)
def test_parts_give_the_row_of_the_plain_text(tmp_path: Path, question: Any, answer: Any) -> None:
    assert encode(tmp_path, [_row(question, answer)]).rows == encode(tmp_path, [_row(QUESTION, ANSWER)]).rows


def test_a_reasoning_part_goes_where_the_template_reads_it(tmp_path: Path) -> None:
    answer = [{"type": "reasoning", "value": "There are two."}, {"type": "text", "value": "Both lamps."}]
    shown = "⟦<think>\nThere are two.\n</think>\n\nBoth lamps.<|im_end|>⟧"
    for template in (REASONING_TEMPLATE, REASONING_TEMPLATE.replace("message.reasoning_content or ", "")):
        assert shown in pictures(tmp_path, [_row("Which lamps?", answer)], template)[0]
    with pytest.raises(DataError, match="message 2 has a part of the type reasoning, which the chat template does not"):
        encode(tmp_path, [_row("Which lamps?", answer)])


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "text"}, "part 1 of content has no text; its keys are type"),
        ({"type": "text", "words": "x"}, "part 1 of content has no text; its keys are type, words"),
        ({"type": "text", "text": None}, "part 1 of content has no text"),
        ({"type": "text", "text": "a", "value": "b"}, "part 1 of content has no single text under one of text, value"),
        ({"type": "tool_use", "name": "f"}, "part 1 of content is of the type tool_use, which edgetune does not read"),
        (["x"], "part 1 of content is neither a text nor an object but list"),
        (None, "part 1 of content is neither a text nor an object but NoneType"),
    ],
)
def test_a_part_without_a_plain_meaning_is_refused(tmp_path: Path, part: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: message 2: {problem}"):
        encode(tmp_path, [_row(QUESTION, [part])])


def test_an_empty_text_is_empty_and_further_keys_of_parts_are_counted(tmp_path: Path) -> None:
    row = _row([{"type": "text", "text": QUESTION, "cache_control": {"type": "x"}}], [{"type": "text", "text": ""}])
    encoding = encode(tmp_path, [row])
    assert encoding.supervised == 1
    assert encoding.usage.describe() == ["content[].cache_control of a message: 1 row, for example rows.jsonl, line 1"]
