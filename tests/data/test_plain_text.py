"""Plain text for continued pretraining: files by lines, paragraphs or as a whole, packed into blocks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.chat_rows import ChatRow, PlainText
from edgetune.data.dataset import read_splits
from edgetune.data.encoded_split import EncodedSplit
from edgetune.data.objective_readers import reader_for
from edgetune.data.problems import RowProblem
from edgetune.data.row_encoder import RowEncoder
from edgetune.data.row_files import RowFile
from tests.cases.rendering import encode, tokenizer_in
from tests.data import templates


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@settings(deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), length=st.integers(3, 40))
def test_packing_loses_and_repeats_no_token(text_folder: Path, texts: list[str], length: int) -> None:
    tokenizer = tokenizer_in(text_folder)
    result = EncodedSplit()
    encoder = RowEncoder(ChatTemplate(templates.CHATML), tokenizer, length, result)
    for text in texts:
        encoder.add(ChatRow([], beside=PlainText(text)))
    encoder.finish()
    (end,) = tokenizer.encode_part("<|im_end|>")
    expected: list[int] = []
    for text in texts:
        ids = tokenizer.encode(text)[0]
        expected += ids if ids[-1:] == [end] else [*ids, end]
    blocks = [row.input_ids for row in result.rows]
    assert [id_ for block in blocks for id_ in block] == expected
    assert all(2 <= len(block) <= length for block in blocks)
    assert all(len(block) == length for block in blocks[:-2])
    assert all(row.supervised == [False, *[True] * (len(row.input_ids) - 1)] for row in result.rows)


@settings(deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab \n\r\t灯\x85\u2028"), max_size=40),
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
)
def test_files_of_text_lose_nothing_but_blank_space_between_documents(
    text_folder: Path, text: str, sample_by: str
) -> None:
    path = text_folder / "a.txt"
    path.write_bytes(text.encode())
    file = RowFile(path, path.name, sample_by=sample_by)
    found = [row["text"] for _, row in file.rows()]
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(part.strip() for part in found)
    if sample_by == "line":
        assert not any("\n" in part for part in found)
    if sample_by == "document":
        assert found in ([], [text])


def test_text_is_packed_with_an_end_between_documents(tmp_path: Path) -> None:
    encoding = encode(tmp_path, [{"text": "One."}, "Two.", {"text": " "}], objective="pretrain")
    tokenizer = tokenizer_in(tmp_path / "base")
    assert [tokenizer.decode(row.input_ids) for row in encoding.rows] == ["One.<|im_end|>Two.<|im_end|>"]
    assert encoding.texts == 2
    reader = reader_for("pretrain", "auto")
    assert list(reader.read_all({"text": ""})) == []
    assert reader.describe() == ["1 row holds no text and is left out"]
    with pytest.raises(RowProblem, match="text is not a text but int"):
        reader.read({"text": 3})


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("line", ["One.", "Two.", "Three."]),
        ("paragraph", ["One.\nTwo.", "Three."]),
        ("document", ["\nOne.\nTwo.\n\n \nThree.\n"]),
    ],
)
def test_a_text_file_is_read_by_lines_paragraphs_or_as_a_whole(
    tmp_path: Path, sample_by: Any, texts: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("\nOne.\nTwo.\n\n \nThree.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Other.", encoding="utf-8")
    config = DataConfig(train=str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"), sample_by=sample_by)
    rows = read_splits(config, 0, objective="pretrain").train
    assert [row.beside for row in rows] == [PlainText(text) for text in texts]
    assert rows[0].place == ("a.txt, line 1" if sample_by == "document" else "a.txt, line 2")
    folder = config.model_copy(update={"train": str(tmp_path)})
    assert len(read_splits(folder, 0, objective="pretrain").train) == len(texts) + 1


def test_a_share_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"Sentence {number} of many. " for number in range(100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    splits = read_splits(DataConfig(train=str(tmp_path / "a.txt")), 0, objective="pretrain")
    parts = [row.beside.text for row in (*splits.train, *splits.validation) if isinstance(row.beside, PlainText)]
    assert "".join(parts) == text or "".join(reversed(parts)) == text
    assert 0.02 < min(map(len, parts)) / len(text) < 0.1
