"""Encoding of whole datasets: what is cut, dropped, split, held out and refused; and how a row is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate, read_override
from edgetune.data.dataset import encode_all, hold_out, read_splits
from edgetune.data.formats import ChatRow
from edgetune.data.preview import format_totals, highlight_row, preview_rows, segments
from edgetune.data.row_store import RowStore
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from tests.converters import vocabularies
from tests.data import templates

CHATML = ChatTemplate(templates.CHATML)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("byte-level")
    vocabularies.byte_level(directory)
    return TextTokenizer.from_directory(directory)


def _talk(*texts: str) -> ChatRow:
    return ChatRow([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])


def test_rows_are_cut_counted_and_dropped(tokenizer: TextTokenizer) -> None:
    rows = [_talk("q", "a"), _talk("q", "a" * 300), _talk("q" * 300, "a")]
    encoding = encode_all(CHATML, tokenizer, rows, 40)
    assert (len(encoding.rows), encoding.truncated, encoding.dropped) == (2, 2, 1)
    assert encoding.longest == 40
    assert encoding.turn_ends == {tokenizer.id_of("<|im_end|>")}
    assert "2 cut at max_length; 1 dropped" in format_totals(encoding)


def test_nothing_to_train_on_is_refused_with_an_example(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"0 % of the tokens would be trained on: .* for example '<\|im_start\|>user"):
        encode_all(CHATML, tokenizer, [_talk("q" * 300, "a")], 20)


def test_everything_trained_on_is_refused_with_an_example(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(DataError, match=r"100 % of the tokens would be trained on: .* for example 'the answer"):
        encode_all(template, tokenizer, [ChatRow([{"role": "assistant", "content": "the answer"}])], 100)


def test_rows_that_never_stop_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"every row is cut at max_length \(30 tokens\)") as caught:
        encode_all(CHATML, tokenizer, [_talk("q", "a" * 300)] * 2, 30)
    assert "Raise training.max_length" in (caught.value.hint or "")


def test_a_template_that_rewrites_history_gives_a_row_for_each_turn(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate(templates.THINKING)
    encoding = encode_all(template, tokenizer, [_talk("q", "a", "q2", "a2"), _talk("q", "a")], 200)
    assert (len(encoding.rows), encoding.split) == (3, 1)
    assert "rewrites history" in (encoding.split_reason or "")
    trained = [
        tokenizer.decode([id_ for id_, yes in zip(row.input_ids, row.supervised, strict=True) if yes])
        for row in encoding.rows
    ]
    assert trained == [f"<think>\n\n</think>\n\n{answer}<|im_end|>" for answer in ("a", "a2", "a")]


def test_holding_out_is_seeded_and_disjoint() -> None:
    rows = [_talk(str(number), "a") for number in range(100)]
    store = RowStore(rows)
    kept, held = map(list, hold_out(store, 0.1, seed=3))
    assert (len(kept), len(held)) == (90, 10)
    assert sorted(kept + held, key=lambda row: int(row.messages[0]["content"])) == rows
    assert [*map(list, hold_out(store, 0.1, seed=3))] == [kept, held]
    assert [*map(list, hold_out(store, 0.1, seed=4))] != [kept, held]
    assert len(hold_out(store, 0.0, seed=0)[1]) == 1


def test_one_row_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="there is one training row"):
        hold_out(RowStore([_talk("q", "a")]), 0.5, 0)


def test_splits_hold_train_validation_and_test_rows(tmp_path: Path) -> None:
    for name, count in (("train", 20), ("more", 5), ("test", 2)):
        lines = [json.dumps({"prompt": f"{name}{n}", "completion": "a"}) + "\n" for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = DataConfig(
        train=[str(tmp_path / "train.jsonl"), str(tmp_path / "more.jsonl#3")],
        test=str(tmp_path / "test.jsonl"),
        max_rows=22,
        validation_fraction=0.25,
    )
    splits = read_splits(config, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 6, 2)
    assert [entry["rows"] for entry in splits.identity["train"]] == [20, 3]
    explicit = read_splits(config.model_copy(update={"validation": str(tmp_path / "test.jsonl")}), seed=0)
    assert (len(explicit.train), len(explicit.validation)) == (22, 2)


def test_preview_sets_trained_text_off(tokenizer: TextTokenizer) -> None:
    row = encode_all(CHATML, tokenizer, [_talk("héllo 灯", "wörld 👍🏽")], 200).rows[0]
    text = highlight_row(row, tokenizer, color=False).plain
    assert text == "<|im_start|>user\nhéllo 灯<|im_end|>\n<|im_start|>assistant\n⟦wörld 👍🏽<|im_end|>⟧\n"
    colored = highlight_row(row, tokenizer, color=True)
    assert colored.plain == text.replace("⟦", "").replace("⟧", "")
    assert [str(span.style) for span in colored.spans] == ["dim", "bold green", "dim"]
    assert "".join(part for _, part in segments(row, tokenizer)) == colored.plain
    (heading, *_) = preview_rows(
        encode_all(CHATML, tokenizer, [_talk("héllo 灯", "wörld 👍🏽")], 200), tokenizer, 1, color=False
    )
    assert heading.plain.startswith(f"row 1: {len(row.input_ids)} tokens, {sum(row.supervised)} trained on (")


@pytest.mark.parametrize(
    ("named", "pads", "why"),
    [
        ({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "<|endoftext|>", "the tokenizer's pad token"),
        ({"pad_token": "<|im_end|>", "eos_token": "<|im_end|>"}, "<|endoftext|>", "pad token is a stop token"),
        ({"eos_token": "<|endoftext|>", "unk_token": "<tool>"}, "<tool>", "has no pad token"),
        ({"eos_token": "<|endoftext|>"}, "<|im_start|>", "has no pad token"),
    ],
)
def test_padding_is_never_a_stop_token(tokenizer: TextTokenizer, named: dict[str, str], pads: str, why: str) -> None:
    chosen = TextTokenizer(tokenizer.backend, named)
    pad, reason = chosen.choose_pad()
    assert tokenizer.text_of(pad) == pads
    assert why in reason
    assert pad not in chosen.stop_ids


def test_stop_tokens_of_the_configs_count(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = TextTokenizer.from_directory(tmp_path)
    assert tokenizer.stop_ids == {7, 9, tokenizer.id_of("<|im_end|>")}


def test_missing_and_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer.json"):
        TextTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        TextTokenizer.from_directory(tmp_path)


def test_add_bos_token_of_the_config_has_the_last_word(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, bos_token="<|endoftext|>", add_bos_token=True)
    tokenizer = TextTokenizer.from_directory(tmp_path)
    ids, offsets = tokenizer.encode("hello")
    assert ids[0] == tokenizer.bos_id
    assert offsets[0] == (-1, -1)
    assert tokenizer.encode("<|endoftext|>hello")[0].count(tokenizer.bos_id or 0) == 1


def test_built_in_alpaca_refuses_roles_it_does_not_know() -> None:
    with pytest.raises(DataError, match="knows the roles system, user, tool and assistant, not narrator"):
        ChatTemplate(read_override("alpaca")).render([{"role": "narrator", "content": "x"}])
