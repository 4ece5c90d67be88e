"""Loss masks against an oracle that writes the template out by hand and labels every character.

Where that does not decide (a token across the beginning of an answer), the law of edgetune/data/masks.py is checked:
see also test_row_properties.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.chat import ChatTemplate, read_override
from edgetune.data.formats import Conversation
from edgetune.data.masks import EncodedRow, encode_answer, encode_conversation
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.turns import HistoryRewriteError
from edgetune.errors import DataError
from tests.converters import vocabularies
from tests.data import templates

Piece = tuple[str, bool]
"""Text, and whether the assistant wrote it (stop token included, what follows it not)."""


def _chatml(conversation: Conversation) -> list[Piece]:
    pieces: list[Piece] = []
    for message in conversation:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def _plain(conversation: Conversation) -> list[Piece]:
    return [
        (
            message["content"] + ("<|im_end|>" if message["role"] == "assistant" else "\n"),
            message["role"] == "assistant",
        )
        for message in conversation
    ]


def _alpaca(conversation: Conversation) -> list[Piece]:
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    pieces: list[Piece] = [(head, False)]
    after_answer = False
    for message in conversation:
        pieces.append(("\n\n" if after_answer else "", False))
        after_answer = message["role"] == "assistant"
        if after_answer:
            pieces += [("### Response:\n", False), (message["content"] + "<|im_end|>", True)]
        else:
            pieces.append((f"### Instruction:\n{message['content']}\n\n", False))
    return pieces


WRITTEN_OUT: dict[str, tuple[str, Callable[[Conversation], list[Piece]]]] = {
    "chatml": (templates.CHATML, _chatml),
    "built-in chatml": (read_override("chatml"), _chatml),
    "plain": (read_override("plain"), _plain),
    "alpaca": (read_override("alpaca"), _alpaca),
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("byte-level")
    vocabularies.byte_level(directory)
    return TextTokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("sentencepiece")
    vocabularies.sentencepiece(directory, bos=True)
    return TextTokenizer.from_directory(directory)


def expected_mask(tokenizer: TextTokenizer, pieces: Sequence[Piece]) -> tuple[str, list[bool]]:
    """Label characters, then give each token its first character's label."""
    text = "".join(piece for piece, _ in pieces)
    labels = [label for piece, label in pieces for _ in piece]
    offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    return text, [labels[start] for start, _ in offsets]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "",
        "\n",
        "\n\n",
        " ",
        "def f():\n    return 1\n",
        "把卧室的灯调到三成亮",
        "👨‍👩‍👧‍👦",
        "a <|im_end|> b",
        "<|im_start|>user\n",
        "### Response:\n",
    ]
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = draw(st.integers(1, 3))
    messages = [{"role": role, "content": draw(TEXT)} for _ in range(turns) for role in ("user", "assistant")]
    return messages if draw(st.booleans()) else [*messages, {"role": "user", "content": draw(TEXT)}]


@given(conversation=conversations(), name=st.sampled_from(sorted(WRITTEN_OUT)))
def test_mask_is_that_of_the_written_out_template(
    byte_level: TextTokenizer, conversation: Conversation, name: str
) -> None:
    source, write_out = WRITTEN_OUT[name]
    pieces = write_out(conversation)
    text, expected = expected_mask(byte_level, pieces)
    template = ChatTemplate(source, None, "<|im_end|>")
    assert template.render(conversation) == text
    encoded = encode_conversation(template, byte_level, conversation)
    whole = byte_level.encode(text)[0]
    prompts = [byte_level.encode(prompt)[0] for prompt in _prompts(pieces)]
    if all(whole[: len(ids)] == ids for ids in prompts):
        assert [row.input_ids for row in encoded.rows] == [whole]
        assert encoded.rows[0].supervised == [False, *expected[1:]]
        return
    trained = [byte_level.decode(stretch) for row in encoded.rows for stretch in stretches(row)]
    answers = [piece for piece, label in pieces if label]
    assert [answer.removesuffix("\n") for answer in trained] == answers
    assert len(encoded.rows) in (1, len(answers))
    for row in encoded.rows:
        starts = [i for i, yes in enumerate(row.supervised) if yes and not row.supervised[i - 1]]
        assert all(row.input_ids[:start] in prompts for start in starts)


def _prompts(pieces: Sequence[Piece]) -> list[str]:
    return ["".join(piece for piece, _ in pieces[:index]) for index, (_, label) in enumerate(pieces) if label]


def stretches(row: EncodedRow) -> list[list[int]]:
    """Return the ids of each stretch of tokens that is trained on."""
    groups = groupby(zip(row.input_ids, row.supervised, strict=True), lambda pair: pair[1])
    return [[id_ for id_, _ in group] for trained, group in groups if trained]


@pytest.mark.parametrize("answer", ["\nred", "\n\nred", "\n", " red", "\n  red", "\u0301red"])
@pytest.mark.parametrize("cutter", sorted(vocabularies.CUTTERS))
def test_an_answer_that_begins_inside_a_token_is_tokenized_apart(tmp_path: Path, cutter: str, answer: str) -> None:
    vocabularies.byte_level(tmp_path, cutter)
    tokenizer = TextTokenizer.from_directory(tmp_path)
    asked = [{"role": "user", "content": "q"}]
    for source in (read_override("chatml"), "{% for m in messages %}{{ m.role }}: {{ m.content }}"
                   "{{ '<|im_end|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}assistant: {% endif %}"):  # fmt: skip
        template = ChatTemplate(source, None, "<|im_end|>")
        given = tokenizer.encode(template.render(asked, add_generation_prompt=True))[0]
        (row,) = encode_conversation(template, tokenizer, [*asked, {"role": "assistant", "content": answer}]).rows
        assert row.input_ids[: len(given)] == given
        (trained,) = stretches(row)
        assert trained == tokenizer.encode_part(answer + "<|im_end|>")
        assert row.supervised.index(True) == len(given)


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_puts_no_space_before_an_answer_that_is_tokenized_apart(tmp_path: Path, prefix: bool) -> None:
    vocabularies.sentencepiece(tmp_path, prefix=prefix, bos=True)
    tokenizer = TextTokenizer.from_directory(tmp_path)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "<s>", "</s>"
    )  # fmt: skip
    asked = [{"role": "user", "content": "a lamp?"}]
    given = tokenizer.encode(template.render(asked, add_generation_prompt=True))[0]
    (row,) = encode_conversation(template, tokenizer, [*asked, {"role": "assistant", "content": "the lamp"}]).rows
    assert row.input_ids[: len(given)] == given
    assert not tokenizer.text_of(row.input_ids[len(given)]).startswith("\u2581")
    assert tokenizer.decode(row.input_ids).removeprefix("<s>").lstrip() == "user: a lamp?\nassistant: the lamp</s>"


def test_an_earlier_answer_inside_a_token_splits_the_row(byte_level: TextTokenizer) -> None:
    template = ChatTemplate(read_override("chatml"), None, "<|im_end|>")
    conversation = [
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", "\na"), ("user", "q2"), ("assistant", "b"))
    ]
    encoded = encode_conversation(template, byte_level, conversation)
    assert "earlier answer begins or ends inside a token" in (encoded.split_reason or "")
    assert [byte_level.decode(*stretches(row)) for row in encoded.rows] == ["\na<|im_end|>", "b<|im_end|>"]
    asked = byte_level.encode(template.render(conversation[:3], add_generation_prompt=True))[0]
    assert encoded.rows[1].input_ids[: len(asked)] == asked
    last_only = encode_conversation(template, byte_level, [*conversation[:2], conversation[2], {**conversation[1]}])
    assert len(last_only.rows) == 2
    conversation[1]["content"] = "a"
    conversation[3]["content"] = "\nb"
    assert encode_conversation(template, byte_level, conversation).split_reason is None


def test_bos_stands_once_and_is_not_trained_on(sentencepiece: TextTokenizer) -> None:
    bos = sentencepiece.bos_id
    assert sentencepiece.adds_bos
    silent = ChatTemplate(read_override("plain"), "<s>", "</s>")
    explicit = ChatTemplate("{{ bos_token }}" + read_override("plain"), "<s>", "</s>")
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    for template in (silent, explicit):
        (row,) = encode_conversation(template, sentencepiece, conversation).rows
        assert row.input_ids.count(bos or 0) == 1
        assert row.input_ids[0] == bos
        assert not row.supervised[0]
        assert row.supervised[-1]
    trained = [id_ for id_, yes in zip(row.input_ids, row.supervised, strict=True) if yes]
    assert sentencepiece.decode(trained) == "world</s>" or sentencepiece.decode(trained, skip_special=True) == "world"


def test_the_stop_token_is_trained_on_and_what_follows_is_not(byte_level: TextTokenizer) -> None:
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (row,) = encode_conversation(ChatTemplate(templates.CHATML), byte_level, conversation).rows
    stop = byte_level.id_of("<|im_end|>")
    assert row.input_ids[-2] == stop
    assert row.supervised[-2:] == [True, False]
    assert row.endings == {stop}
    assert row.labels[-2:] == [stop, -100]


def test_a_template_without_stop_token_is_refused(byte_level: TextTokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(DataError, match="ends the assistant's turn without a stop token"):
        encode_conversation(
            template, byte_level, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]
        )


def test_rewritten_history_splits_the_row_and_names_the_difference(byte_level: TextTokenizer) -> None:
    conversation = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na2"},
    ]
    template = ChatTemplate(templates.THINKING)
    encoded = encode_conversation(template, byte_level, conversation)
    assert re.search(r"up to message 2 has '<think>\\nhm.* where the whole has 'a<\|im_end", encoded.split_reason or "")
    trained = [byte_level.decode(*stretches(row)) for row in encoded.rows]
    assert trained == [f"<think>\nhm\n</think>\n\n{answer}<|im_end|>" for answer in ("a", "a2")]
    assert encode_answer(template, byte_level, conversation) == encoded.rows[1]


def test_a_prompt_that_the_answer_does_not_continue_is_refused(byte_level: TextTokenizer) -> None:
    template = ChatTemplate(read_override("chatml") + "{% if add_generation_prompt %}Sure: {% endif %}")
    with pytest.raises(HistoryRewriteError, match=r"the prompt before message 2 has 'Sure: ' where "):
        encode_conversation(
            template, byte_level, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        )


def test_a_cut_row_keeps_its_first_tokens() -> None:
    row = EncodedRow([5, 6, 7], [False, True, True])
    assert row.cut(2) == EncodedRow([5, 6], [False, True])
    assert row.scored == [1, 2]
