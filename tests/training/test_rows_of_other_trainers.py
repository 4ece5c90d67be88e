"""Rows and labels against transformers' own mask and TRL's way with prompts, over random conversations.

They tokenize the whole text once. Where its ids do not begin with those of the prompt, TRL warns that the model is
trained on what it never sees; edgetune's row begins with the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import to_chat_row
from edgetune.data.masks import encode_conversation
from edgetune.data.text_tokenizer import TextTokenizer
from tests.converters import vocabularies
from tests.data.schemes import CONTENTS

GENERATION = {
    "chatml": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{%- else %}"
        "{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "plain": (
        "{%- for m in messages %}{{- m.role + ':' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{- ' ' + m.content + '<|im_end|>' }}{% endgeneration %}{%- else %}"
        "{{- ' ' + m.content }}{%- endif %}{{- '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
    ),
    "thinking": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}{% generation %}"
        "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>' }}"
        "{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
}
CUTTERS = sorted(vocabularies.CUTTERS)


class _Pairs(dict[str, tuple[TextTokenizer, Any]]):
    def __repr__(self) -> str:
        return "pairs"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> _Pairs:
    found = _Pairs()
    for cutter in CUTTERS:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        vocabularies.byte_level(folder, cutter)
        found[cutter] = TextTokenizer.from_directory(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return found


@st.composite
def _talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=4))
    reasoning = st.fixed_dictionaries({}, optional={"reasoning_content": CONTENTS})
    return [
        {"role": role, "content": draw(CONTENTS)} | draw(reasoning)
        for role in ("user", *roles, "assistant")
    ]  # fmt: skip


@settings(deadline=None)
@given(messages=_talks(), source=st.sampled_from(sorted(GENERATION)), cutter=st.sampled_from(CUTTERS))
def test_ids_and_labels_are_those_of_transformers_mask(
    pairs: _Pairs, messages: list[dict[str, Any]], source: str, cutter: str
) -> None:
    tokenizer, theirs = pairs[cutter]
    template = GENERATION[source]
    wanted = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode_conversation(ChatTemplate(template), tokenizer, messages)
    prompts = [
        theirs.apply_chat_template(
            messages[:index], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if all(wanted["input_ids"][: len(prompt)] == prompt for prompt in prompts):
        (row,) = encoded.rows
        assert row.input_ids == wanted["input_ids"]
        assert row.supervised == [bool(mark) for mark in wanted["assistant_masks"]]
        return
    if len(encoded.rows) == 1:
        starts = [
            i for i, yes in enumerate(encoded.rows[0].supervised) if yes and not encoded.rows[0].supervised[i - 1]
        ]
        assert [encoded.rows[0].input_ids[:start] for start in starts] == prompts
    else:
        assert [row.input_ids[: row.supervised.index(True)] for row in encoded.rows] == prompts


@settings(deadline=None)
@given(
    prompt=CONTENTS, completion=CONTENTS, source=st.sampled_from(sorted(GENERATION)), cutter=st.sampled_from(CUTTERS)
)
def test_prompt_and_completion_are_those_of_trl(
    pairs: _Pairs, prompt: str, completion: str, source: str, cutter: str
) -> None:
    data_utils = pytest.importorskip("trl.trainer.sft_trainer")
    tokenizer, theirs = pairs[cutter]
    template = GENERATION[source]
    row = to_chat_row({"prompt": prompt, "completion": completion})
    (found,) = encode_conversation(ChatTemplate(template), tokenizer, row.messages).rows
    options = {"chat_template": template, "return_dict": False}
    given_ids = theirs.apply_chat_template(row.messages[:1], add_generation_prompt=True, **options)
    whole = theirs.apply_chat_template(row.messages, **options)
    length = data_utils.common_prefix_length(given_ids, whole)
    assert found.input_ids[: len(given_ids)] == given_ids
    assert found.supervised.index(True) == len(given_ids)
    if length == len(given_ids):  # otherwise TRL warns
        assert found.input_ids == whole
        assert sum(found.supervised) in (len(whole) - length, len(whole) - length - 1)  # without the last line end
