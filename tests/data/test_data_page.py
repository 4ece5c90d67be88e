"""The page about rows: its examples are read as it says, and its tables are those of the readers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.config import ColumnsConfig
from edgetune.data import key_names
from edgetune.data.chat_rows import Pair
from edgetune.data.formats import COLUMNS, RowReader, to_chat_row
from edgetune.data.objective_readers import READERS
from edgetune.data.problems import RowProblem
from edgetune.data.row_kinds import PAIR
from edgetune.data.row_layouts import FORMATS

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
EXCHANGE = [{"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "On."}]


def _block(info: str) -> str:
    (text,) = re.findall(rf"^```{info}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.mark.parametrize("line", _block("jsonl same").splitlines())
def test_the_shapes_of_the_page_are_the_same_conversation(line: str) -> None:
    assert to_chat_row(json.loads(line)).messages == EXCHANGE


@pytest.mark.parametrize("line", _block("jsonl pairs").splitlines())
def test_the_pairs_of_the_page_are_the_same_pair(line: str) -> None:
    (row,) = READERS[(PAIR,)]().read_all(json.loads(line))
    assert row.messages == EXCHANGE
    assert isinstance(row.beside, Pair)
    assert row.beside.rejected.messages == [EXCHANGE[0], {"role": "assistant", "content": "Off."}]
    assert not row.unread


def test_the_example_of_columns_is_read_as_the_page_says() -> None:
    data: Any = yaml.safe_load(_block("yaml columns"))["data"]
    reader = RowReader(columns=data["columns"], roles=data["roles"])
    for line in _block("jsonl columns").splitlines():
        assert reader.read(json.loads(line)).messages == [{"role": "system", "content": "Be brief."}, *EXCHANGE]
    reader.check_columns()


def test_the_options_of_columns_are_the_meanings_that_are_read() -> None:
    assert tuple(ColumnsConfig.model_fields) == COLUMNS


def _rows_of(form: str) -> list[dict[str, Any]]:
    """Return a row for each name that the page lists for a format."""
    tables = FORMATS[form].names()
    rows: list[dict[str, Any]] = []
    if "conversation" in tables:
        rows += [{key: EXCHANGE} for key in tables["conversation"]]
        for role in tables["role"]:
            rows.append(
                {tables["conversation"][0]: [{role: each["role"], "content": each["content"]} for each in EXCHANGE]}
            )
        for text in tables["content"]:
            rows.append(
                {tables["conversation"][0]: [{"role": each["role"], text: each["content"]} for each in EXCHANGE]}
            )
        return rows
    if form == "text":
        return [{key: "Lamp?"} for key in tables["text"]]
    if "assistant" not in tables:
        answers = _answers_of(tables)
        prompts = [{key: EXCHANGE[:1]} for key in tables["messages"]] + [{key: "Lamp?"} for key in tables["or user"]]
        prompts += [{"instruction": "Lamp?", key: ""} for key in tables["appended to an instruction"]]
        return [prompt | answer for answer in answers for prompt in prompts if not prompt.keys() & answer.keys()]
    for user in tables["user"]:
        for assistant in tables["assistant"]:
            if user != assistant:
                rows.append({user: "Lamp?", assistant: "On."})
    return rows


def _answers_of(tables: Any) -> list[dict[str, Any]]:
    if "better" in tables:
        return [{one: "On.", other: "Off."} for one in tables["better"] for other in tables["worse"]]
    if "answers" in tables:
        lists = [{key: ["On.", "Off."]} for key in tables["answers"]]
        return lists + [
            {"responses": ["On.", "Off."], key: [1, 2]} for key in tables["scores"] if key.startswith("rank")
        ]
    return [{}]


@pytest.mark.parametrize("form", FORMATS)
def test_every_key_of_the_tables_is_read(form: str) -> None:
    rows = _rows_of(form)
    expected = {"prompt": EXCHANGE[:1], "text": []}.get(form, EXCHANGE)
    assert len(rows) > (2 if form == "text" else 8)
    for row in rows:
        read = READERS[(FORMATS[form].kinds[0],)](form).read(row)
        assert read.messages == expected, row
        assert not read.unread, row
        assert f"`{next(iter(row))}`" in PAGE


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in key_names.ROLES.items() for name in names])
def test_every_role_of_the_table_is_read(role: str, name: str) -> None:
    read = to_chat_row({"messages": [{"role": name, "content": "x"}, EXCHANGE[1]]})
    assert read.messages[0]["role"] == role
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("key", ["chosen", "rejected", "rejected_response", "label", "kto_tag", "loss_mask", "images"])
def test_what_the_page_says_is_refused_is_refused(key: str) -> None:
    assert f"`{key}`" in PAGE or key == "images"
    with pytest.raises(RowProblem):
        to_chat_row({"messages": EXCHANGE, key: True})
