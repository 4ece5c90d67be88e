"""Random rows of every objective, from the file to token ids: an error with file and line, or the law of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import encode_all
from edgetune.data.encoded_split import EncodedSplit
from edgetune.data.objective_readers import reader_for
from edgetune.data.objective_rows import EncodedAnswer
from edgetune.data.sources import read_source
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from tests.cases import rendering
from tests.data.schemes import CONTENTS
from tests.data.test_row_fuzz import (
    EXTRAS,
    GOOD,
    MESSAGES,
    OF_NO_ROW,
    ROWS,
    SOUND_MESSAGES,
    SOUND_ROWS,
    SOURCES,
    TALKS,
    TEXTS,
    VALUES,
    damaged,
)

OTHERS = {key: values for key, values in EXTRAS.items() if key != "chosen"}
UNKNOWN = {"zz_unknown": CONTENTS}
ANSWERS = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS})
SIDES = TEXTS | st.lists(ANSWERS, min_size=1, max_size=2) | GOOD | TALKS | VALUES
PROMPTS = TEXTS | st.lists(MESSAGES, max_size=2) | VALUES
SCORED = st.fixed_dictionaries({"text": TEXTS}, optional={"score": st.integers(0, 3) | VALUES, "rank": VALUES})
OBJECTIVE_ROWS = (
    st.fixed_dictionaries({"prompt": PROMPTS, "chosen": SIDES, "rejected": SIDES}, optional=OTHERS)
    | st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}, optional={"margin": VALUES})
    | st.fixed_dictionaries({"chosen": SIDES, "rejected": SIDES}, optional=OTHERS)
    | st.fixed_dictionaries({"messages": TALKS | GOOD, "rejected_response": SIDES}, optional=EXTRAS)
    | st.fixed_dictionaries(
        {"prompt": PROMPTS, "responses": st.lists(TEXTS | SCORED | VALUES, max_size=3) | VALUES},
        optional={**EXTRAS, "scores": VALUES | st.lists(st.integers(0, 2), max_size=3)},
    )
    | st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS, "label": st.booleans() | VALUES})
    | st.fixed_dictionaries({"messages": GOOD, "kto_tag": st.booleans()}, optional=EXTRAS)
    | st.fixed_dictionaries({"prompt": PROMPTS}, optional={**EXTRAS, "answer": VALUES})
    | st.fixed_dictionaries({"text": TEXTS | VALUES}, optional={"zz_unknown": VALUES, "url": VALUES})
    | ROWS
)  # fmt: skip


SOUND: dict[str, st.SearchStrategy[Any]] = {
    "dpo": st.fixed_dictionaries({"prompt": CONTENTS, "chosen": CONTENTS, "rejected": CONTENTS}, optional=UNKNOWN)
    | st.builds(
        lambda talk, better, worse: {
            "chosen": [*talk, {"role": "assistant", "content": better}],
            "rejected": [*talk, {"role": "assistant", "content": worse}],
        },
        st.lists(SOUND_MESSAGES, max_size=3).map(lambda talk: [*talk, {"role": "user", "content": "q"}]),
        CONTENTS, CONTENTS,
    )
    | st.fixed_dictionaries(
        {"prompt": CONTENTS, "responses": st.lists(CONTENTS, min_size=2, max_size=3, unique_by=str.strip)}
    ),
    "kto": st.fixed_dictionaries({"prompt": CONTENTS, "completion": CONTENTS, "label": st.booleans()}, optional=UNKNOWN)
    | st.builds(lambda row, label: {**row, "label": label}, SOUND_ROWS, st.booleans()),
    "grpo": st.fixed_dictionaries({"prompt": CONTENTS, "answer": CONTENTS}, optional=UNKNOWN),
    "pretrain": st.fixed_dictionaries({"text": CONTENTS}, optional=UNKNOWN),
    "distillation": SOUND_ROWS,
    "sft": SOUND_ROWS,
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[Any], str, int]:
    """Return an objective, rows, a template and max_length: mostly sound ones, or anything."""
    objective = draw(st.sampled_from(sorted(SOUND)))
    if draw(st.integers(0, 3)):
        return objective, draw(st.lists(SOUND[objective], min_size=1, max_size=3)), draw(SOURCES), 4096
    rows = draw(st.lists(OBJECTIVE_ROWS | SOUND[objective], min_size=1, max_size=3))
    return objective, rows, draw(SOURCES | damaged()), draw(st.sampled_from([20, 60, 4096]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@settings(deadline=None)
@given(case=cases())
def test_rows_of_every_objective_are_refused_with_file_and_line_or_keep_the_law(
    folder: Path, case: tuple[str, list[Any], str, int]
) -> None:
    objective, rows, source, length = case
    tokenizer = rendering.tokenizer_in(folder / "base")
    template = ChatTemplate(source, "<|endoftext|>", "<|im_end|>")
    path = rendering.write_jsonl(folder / "rows.jsonl", rows)
    message = ""
    try:
        read = read_source(path, reader=reader_for(objective, "auto")).rows
        encoding = encode_all(template, tokenizer, read, length)
    except DataError as error:
        message = error.message
    if message:
        event(f"{objective} refused")
        assert "rows.jsonl, line " in message or any(part in message for part in (*OF_NO_ROW, "distillation takes"))
        return
    event(f"{objective} encoded")
    assert all(len(row.input_ids) <= length for row in encoding.rows)
    _check_answers(tokenizer, encoding)
    if len(encoding.chats) == len(encoding.pairs):
        for chat, pair in zip(encoding.chats, encoding.pairs, strict=True):
            asked = chat.messages[: chat.answers[0]]
            prompt = template.with_options(chat.options).render(asked, add_generation_prompt=True, tools=chat.tools)
            assert pair.prompt_ids == tokenizer.encode(prompt)[0][:length]
    said = "\n".join(encoding.usage.describe())
    for row in rows:
        if isinstance(row, dict) and row.get("zz_unknown") not in (None, "", [], {}) and read:
            used = objective == "grpo" or (objective == "distillation" and encoding.prompts)
            assert used or "zz_unknown" in said or objective == "pretrain"


def _check_answers(tokenizer: TextTokenizer, encoding: EncodedSplit) -> None:
    for pair in encoding.pairs:
        assert pair.chosen.prompt_ids == pair.rejected.prompt_ids
        assert pair.chosen_ids != pair.rejected_ids
        for side in (pair.chosen, pair.rejected):
            _check_answer(tokenizer, side)
    for labelled in encoding.labelled:
        _check_answer(tokenizer, labelled.answer)
    for prompt in encoding.prompts:
        assert prompt.prompt_ids


def _check_answer(tokenizer: TextTokenizer, answer: EncodedAnswer) -> None:
    assert answer.prompt_length >= 1
    assert answer.answer_ids
    assert answer.answer_mask[0]
    assert not any(answer.row.supervised[: answer.prompt_length])
