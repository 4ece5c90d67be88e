"""Loss masks against an oracle that writes the template out by hand and labels every character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.chat import ChatTemplate, read_override
from edgetune.data.formats import Conversation
from edgetune.data.masks import EncodedRow, HistoryRewriteError, encode_conversation, mark_supervised, render_with_spans
from edgetune.data.text_tokenizer import TextTokenizer
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
    text, expected = expected_mask(byte_level, write_out(conversation))
    template = ChatTemplate(source, None, "<|im_end|>")
    assert render_with_spans(template, conversation).text == text
    row = encode_conversation(template, byte_level, conversation)
    assert row.input_ids == byte_level.backend.encode(text, add_special_tokens=False).ids
    assert row.supervised == [False, *expected[1:]]


@given(
    spans=st.lists(st.integers(0, 40), max_size=6, unique=True).map(sorted),
    cuts=st.lists(st.integers(0, 40), max_size=30).map(sorted),
)
def test_tokens_belong_to_the_span_of_their_first_character(spans: list[int], cuts: list[int]) -> None:
    pairs = list(zip(spans[::2], spans[1::2], strict=False))
    offsets = list(zip(cuts, [*cuts[1:], 41], strict=False))
    oracle = [any(start <= offset[0] < end for start, end in pairs) for offset in offsets]
    assert mark_supervised(offsets, pairs) == oracle


def test_tokens_across_a_boundary_belong_to_the_turn_of_their_first_character() -> None:
    """given|answer|rest: a token that begins in the prompt is given, one that begins in the answer is trained on."""
    assert mark_supervised([(0, 3), (3, 7), (7, 12), (12, 20), (20, 21)], [(5, 15)]) == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_bos_stands_once_and_is_not_trained_on(sentencepiece: TextTokenizer) -> None:
    bos = sentencepiece.bos_id
    assert sentencepiece.adds_bos
    silent = ChatTemplate(read_override("plain"), "<s>", "</s>")
    explicit = ChatTemplate("{{ bos_token }}" + read_override("plain"), "<s>", "</s>")
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    for template in (silent, explicit):
        row = encode_conversation(template, sentencepiece, conversation)
        assert row.input_ids.count(bos or 0) == 1
        assert row.input_ids[0] == bos
        assert not row.supervised[0]
        assert row.supervised[-1]
    trained = [id_ for id_, yes in zip(row.input_ids, row.supervised, strict=True) if yes]
    assert sentencepiece.decode(trained) == "world</s>" or sentencepiece.decode(trained, skip_special=True) == "world"


def test_the_stop_token_is_trained_on_and_what_follows_is_not(byte_level: TextTokenizer) -> None:
    row = encode_conversation(
        ChatTemplate(templates.CHATML),
        byte_level,
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    )
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


def test_rewritten_history_names_the_difference(byte_level: TextTokenizer) -> None:
    conversation = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na2"},
    ]
    template = ChatTemplate(templates.THINKING)
    with pytest.raises(
        HistoryRewriteError, match=r"up to message 2 has '<think>\\nhm.* where the whole has 'a<\|im_end"
    ):
        encode_conversation(template, byte_level, conversation)
    row = encode_conversation(template, byte_level, conversation, only_last=True)
    trained = [id_ for id_, yes in zip(row.input_ids, row.supervised, strict=True) if yes]
    assert byte_level.decode(trained) == "<think>\nhm\n</think>\n\na2<|im_end|>"


def test_a_cut_row_keeps_its_first_tokens() -> None:
    row = EncodedRow([5, 6, 7], [False, True, True])
    assert row.cut(2) == EncodedRow([5, 6], [False, True])
    assert row.scored == [1, 2]
