"""Files and hub datasets, whole and damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import load_config
from edgetune.data import sources
from edgetune.data.sources import read_source
from edgetune.errors import DataError

ROW = {"prompt": "q", "completion": "a"}


def _file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_with_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", "\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    source = read_source(name)
    assert len(source.rows) == 2
    assert source.formats == ["prompt-completion"]
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert source.identity == {"path": name, "sha256": digest, "rows": 2}


def test_json_array_object_and_lines(tmp_path: Path) -> None:
    assert len(read_source(_file(tmp_path / "a.json", json.dumps([ROW] * 3))).rows) == 3
    assert len(read_source(_file(tmp_path / "b.json", json.dumps({"data": [ROW]}))).rows) == 1
    assert len(read_source(_file(tmp_path / "c.json", json.dumps(ROW) + "\n" + json.dumps(ROW))).rows) == 2


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"instruction": ["q"], "input": [None], "output": ["a"], "messages": [None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_source(str(tmp_path / "a.parquet")).formats == ["alpaca"]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"bad.parquet is not a parquet file"):
        read_source(_file(tmp_path / "bad.parquet", "PAR1 not really"))


def test_a_number_after_the_name_takes_the_first_rows(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", (json.dumps(ROW) + "\n") * 9)
    assert len(read_source(f"{name}#5").rows) == 5
    assert len(read_source(f"{name}#5", limit=2).rows) == 2


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", "\n".join([json.dumps(ROW), '{"prompt": ', json.dumps(ROW), "[1]", '{"x": 1}']))
    with pytest.raises(DataError) as caught:
        read_source(name)
    message = caught.value.message
    assert "3 problems in the data" in message
    assert "a.jsonl, line 2: not JSON: Expecting value" in message
    assert "a.jsonl, line 4: not an object but list" in message
    assert "a.jsonl, line 5: in no known format; its keys are x; looked for messages" in message


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", "", "is empty: it holds no rows"),
        ("a.json", "  \n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '[{"prompt": 1,]', "a.json, line 1: not JSON"),
        ("a.json", "3", "holds int, not an array"),
        ("a.csv", "x", "a.csv is of an unknown kind"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_source(_file(tmp_path / name, text))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_source(str(tmp_path / "a.jsonl"))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        read_source(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="there is no data file"):
        read_source("data/nothing.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read_source(str(tmp_path))


def test_hub_names_record_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    hub: Any = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    class Api:
        def dataset_info(self, name: str) -> Any:
            return type("Info", (), {"sha": "f" * 40})()

    def load(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name, subset=subset)
        return [ROW, ROW]

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = read_source("org/name:main#2", split="test")
    assert asked == {"name": "org/name", "subset": "main", "split": "test[:2]", "revision": "f" * 40}
    assert source.identity["revision"] == "f" * 40


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")

    class Api:
        def dataset_info(self, name: str) -> Any:
            raise OSError("no network\nand a long story")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(DataError, match=r"neither a file nor a Hugging Face dataset that can be loaded: no network$"):
        read_source("org/name")


def test_what_counts_as_a_hub_name(tmp_path: Path) -> None:
    names = {
        "squad": True,
        "org/name": True,
        "org/name:sub": True,
        "x.jsonl": False,
        "./x": False,
        "/x": False,
        "a b": False,
    }
    assert {name: sources._is_hub_name(name) for name in names} == names


def test_paths_with_a_row_count_are_relative_to_the_configuration(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", (json.dumps(ROW) + "\n") * 9)
    (tmp_path / "config.yaml").write_text("base: org/model\ndata: {train: 'a.jsonl#5', validation: org/name#7}")
    data = load_config(tmp_path / "config.yaml").data
    assert data.train == f"{tmp_path / 'a.jsonl'}#5"
    assert data.validation == "org/name#7"
