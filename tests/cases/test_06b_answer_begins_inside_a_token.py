"""The tokens of a training row begin with the tokens of its prompt, also where one text would merge the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.chat import ChatTemplate
from tests.cases.rendering import encode, tokenizer_in
from tests.data import templates

PLAIN_PROMPT = (
    "{%- for message in messages %}{{- 'Human: ' + message.content + '\n' if message.role == 'user' else "
    "'Assistant: ' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant: ' }}{%- endif %}"
)
TURN_BEGINS_WITH_A_LINE = PLAIN_PROMPT.replace("Assistant: '", "Assistant:\n'").replace("'Human", "'\nHuman")


def _talk(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.mark.parametrize("answer", ["\nred", "red", " red", "\n\n", "\tred", "\r\nred"])
@pytest.mark.parametrize("source", [templates.CHATML, PLAIN_PROMPT, TURN_BEGINS_WITH_A_LINE])
@pytest.mark.parametrize("as_messages", [True, False])
def test_a_row_begins_with_its_prompt_as_transformers_tokenizes_it(
    tmp_path: Path, source: str, answer: str, as_messages: bool
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    row = _talk("lamp 7?", answer) if as_messages else {"prompt": "lamp 7?", "completion": answer}
    (encoded,) = encode(tmp_path, [row], source).rows
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_in(tmp_path / "base").backend)
    given = theirs.apply_chat_template(
        _talk("lamp 7?")["messages"], chat_template=source, add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[: len(given)] == given
    stop = theirs.convert_tokens_to_ids("<|im_end|>")
    assert encoded.labels[len(given) : len(given) + sum(encoded.supervised)] == [
        *theirs(answer, add_special_tokens=False)["input_ids"],
        stop,
    ]
    whole = theirs.apply_chat_template(row.get("messages", _talk("lamp 7?", answer)["messages"]), chat_template=source,
                                       tokenize=False)  # fmt: skip
    assert theirs.decode(encoded.input_ids) == whole


def test_conversations_are_split_where_no_single_row_has_the_prompts_of_all_turns(tmp_path: Path) -> None:
    encoding = encode(tmp_path, [_talk("q", "a", "q2", "\nb"), _talk("q", "\na", "q2", "b", "q3", "c")])
    assert (len(encoding.rows), encoding.split) == (4, 1)
    assert "inside a token" in (encoding.split_reason or "")
    template, tokenizer = ChatTemplate(templates.CHATML), tokenizer_in(tmp_path / "base")
    messages = _talk("q", "\na", "q2", "b", "q3", "c")["messages"]
    for row, count in zip(encoding.rows[1:], (1, 3, 5), strict=True):
        given = tokenizer.encode(template.render(messages[:count], add_generation_prompt=True))[0]
        assert row.input_ids[: len(given)] == given
        assert row.supervised.index(True) == len(given)
