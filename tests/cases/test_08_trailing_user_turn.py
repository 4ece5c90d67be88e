"""What follows the last assistant turn is left out and counted, whatever the template makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.rendering import encode
from tests.data import templates

END_OF_TEXT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- else %}{{- '<|endoftext|>' }}"
    "{%- endif %}"
)
BEHIND_THE_LAST_QUESTION = (
    "{%- set last = namespace(question=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > last.question %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = [END_OF_TEXT, BEHIND_THE_LAST_QUESTION, templates.THINKING, templates.CHATML]
ROW = [
    {"role": "user", "content": "Lamp 2?"},
    {"role": "assistant", "content": "Off."},
    {"role": "user", "content": "And lamp 3?"},
    {"role": "assistant", "content": "On."},
]
TRAILING: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": "And 4?"}], "1 row ends with the user: that turn is left out (rows.jsonl, line 2)"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "1 row ends with the user"),
    ([{"role": "tool", "content": "on"}], "1 row ends with a tool result"),
    ([{"role": "system", "content": "Be brief."}], "1 row ends with a system message"),
    ([{"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}], "1 row ends with the user"),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [2, 4])
@pytest.mark.parametrize(("trailing", "said"), TRAILING)
def test_ids_and_labels_are_those_of_the_row_without_it(
    tmp_path: Path, template: str, turns: int, trailing: list[dict[str, Any]], said: str
) -> None:
    other = {"messages": [{"role": "user", "content": "Lamp 1?"}, {"role": "assistant", "content": "On."}]}
    found = encode(tmp_path, [other, {"messages": [*ROW[:turns], *trailing]}, other], template)
    wanted = encode(tmp_path, [other, {"messages": ROW[:turns]}, other], template)
    assert found.rows == wanted.rows
    assert not wanted.trailing.describe()
    assert [line.startswith(said) for line in found.trailing.describe()] == [True]


def test_rows_are_counted_by_the_role_of_their_last_message(tmp_path: Path) -> None:
    rows = [{"messages": [*ROW[:2], *trailing]} for trailing, _ in TRAILING[:4]]
    assert encode(tmp_path, rows).trailing.describe() == [
        "2 rows end with the user: these turns are left out; for example rows.jsonl, line 1",
        "1 row ends with a tool result: that turn is left out (rows.jsonl, line 3)",
        "1 row ends with a system message: that turn is left out (rows.jsonl, line 4)",
    ]
